"""Taps for modules: which one watches which kind, and what a module's own forward may do without one."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from torch import nn

from vestige.gradients._function_uses import Forward, FunctionTap, FunctionUses, Takes
from vestige.gradients._rule_convolution import ConvolutionTap
from vestige.gradients._rule_experts import ExpertsTap
from vestige.gradients._rule_relative_bias import RelativeBiasTap
from vestige.gradients._rules import Handle, LayerTap, LinearTap, NormTap, Receive
from vestige.models import Component, LayerKind

_TAPS: dict[LayerKind, Callable[..., LayerTap]] = {
    "linear": LinearTap,
    "conv1d": LinearTap,
    "embedding": FunctionTap,
    "norm": NormTap,
    "convolution": ConvolutionTap,
    "relative_bias": RelativeBiasTap,
    "router": FunctionTap,
    "experts": ExpertsTap,
}
_PLAIN = {
    layer.forward
    for layer in (
        nn.Linear,
        nn.Conv1d,
        nn.Conv2d,
        nn.Conv3d,
        nn.ConvTranspose1d,
        nn.ConvTranspose2d,
        nn.ConvTranspose3d,
    )
}


class ModuleUse(NamedTuple):
    """A module that holds selected parameters."""

    module: Any
    kind: LayerKind
    numbers: dict[str, int]
    """Role of a parameter -> number of its component."""

    def tap(self, receive: Callable[[], Receive]) -> LayerTap | None:
        """Return the tap that watches this module; None for parameters that only functions read."""
        found = _TAPS.get(self.kind)
        if found in (LinearTap, ConvolutionTap) and not self._is_plain():
            found = FunctionTap
        return None if found is None else found(self.module, self.numbers, receive)

    def follow(self, uses: FunctionUses, tap: LayerTap) -> list[Handle]:
        """Place hooks that mark in `uses` when the module's forward runs."""
        takes: Takes = "function" if isinstance(tap, FunctionTap) else "module"
        if isinstance(tap, LinearTap | ConvolutionTap):
            takes = "product"
        holder = self.module.relative_attention_bias if self.kind == "relative_bias" else self.module
        own = Forward(frozenset(map(id, holder.parameters(recurse=False))), takes)

        def begin(module: nn.Module, inputs: Any) -> None:  # noqa: ARG001
            uses.running.append(own)

        def end(module: nn.Module, inputs: Any, output: Any) -> None:  # noqa: ARG001
            uses.running.pop()

        return [
            self.module.register_forward_pre_hook(begin, prepend=True),
            self.module.register_forward_hook(end, always_call=True),
        ]

    def _is_plain(self) -> bool:
        """Return whether the forward is PyTorch's and its output the product: subclasses may return anything."""
        own = vars(self.module)
        if "forward" in own and "_old_forward" not in own:  # replaced, and not by accelerate to move the inputs
            return False
        return self.kind == "conv1d" or type(self.module).forward in _PLAIN


def attach_all(
    modules: Iterable[ModuleUse], receive: Callable[[], Receive], uses: FunctionUses | None = None
) -> list[Handle]:
    """Place the taps of all modules; those that `uses` watches by itself have none."""
    handles: list[Handle] = []
    for one in modules:
        tap = one.tap(receive)
        if tap is not None and uses is not None:
            handles += one.follow(uses, tap)
        if tap is not None and (uses is None or not isinstance(tap, FunctionTap)):
            handles += tap.attach()
    return handles


def modules_of(model: nn.Module, components: Sequence[Component], without: str | None = None) -> dict[str, ModuleUse]:
    """Return every module that holds a use of the components, by path, but for one."""
    found: dict[str, ModuleUse] = {}
    for number, component in enumerate(components):
        for use in component.uses:
            if use.module != without:
                entry = found.setdefault(use.module, ModuleUse(model.get_submodule(use.module), use.kind, {}))
                entry.numbers[use.role] = number
    return found
