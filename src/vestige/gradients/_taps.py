"""Taps for modules: which one watches which kind, and what a module's own forward may do without one."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vestige.errors import ModelError
from vestige.gradients._functions import Forward, FunctionUses, Table, Takes, table_of
from vestige.gradients._rule_special import ExpertsTap, RelativeBiasTap
from vestige.gradients._rules import Handle, LinearTap, NormTap, Receive, Replacement, owner_of
from vestige.models import Component, LayerKind, layer_kind


def keep_examples_apart(model: nn.Module) -> Iterator[Handle]:
    """Make the activated layers of a model compute every example in its own row, until the handles are removed.

    PEFT gathers the activated tokens of the whole batch in one list before it applies the matrices: no row of their
    input belongs to an example. The same matrices applied to all tokens, and counted where PEFT counts them, give the
    same output with the examples apart.
    """
    for _, layer, adapter in find_activated(model):
        yield Replacement(layer.lora_variant, adapter, _RowByRow)


def find_activated(model: nn.Module) -> Iterator[tuple[str, Any, str]]:
    """Yield the path of every layer with an activated adapter, the layer, and the adapter's name."""
    for path, module in model.named_modules():
        variants: Any = getattr(module, "lora_variant", None)
        for adapter, variant in variants.items() if isinstance(variants, dict) else ():
            if getattr(variant, "__name__", type(variant).__name__).startswith("ALora"):
                yield path, module, adapter


class _RowByRow:
    """PEFT's variant of a linear layer, as a class with one static function."""

    @staticmethod
    def forward(layer: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """Add the adapter's output at the last `alora_offsets[example]` tokens of every example."""
        down, up = layer.lora_A[active_adapter], layer.lora_B[active_adapter]
        tokens = result.shape[-2]
        offsets = kwargs.get("alora_offsets") or [None] * len(result)
        first = torch.tensor([tokens - min(offset or 0, tokens) for offset in offsets], device=result.device)
        active = torch.arange(tokens, device=result.device) >= first[:, None]
        dropout: Callable[[Tensor], Tensor] = layer.lora_dropout[active_adapter]
        added = up(down(dropout(x.to(down.weight.dtype)))) * layer.scaling[active_adapter]
        return torch.where(active[..., None], result + added.to(result.dtype), result)


CHANGING = ("relative_bias", "experts")
"""Kinds whose tap replaces a computation: the same numbers up to rounding, which is not the same bits."""


def observable(component: Component) -> bool:
    """Return whether the gradient of a component can be watched without changing how it is computed."""
    return not any(use.kind in CHANGING for use in component.uses)


def observe(
    model: nn.Module, components: Sequence[Component], receive: Callable[[], Receive], by_function: bool = False
) -> list[Handle]:
    """Place taps on every use of the components; `receive()` returns their sink at the moment of the forward pass.

    Unlike `GradientPass`, which freezes the weights and runs a loss of its own, this leaves the flags, the loss and the
    backward pass to the caller. What a tap hands over is each example's share in the gradient of that loss, and the
    shares add up to the gradient that autograd writes into `.grad`.

    Args:
        model: The model, whose own forward the caller runs.
        components: What is watched.
        receive: Where the factors go.
        by_function: Whether parameters are read outside the forward of their module, as `GradientPass.by_function`
            found: then every function of the model's forward is watched.

    Raises:
        ModelError: a component is not `observable`.
    """
    for component in components:
        if not observable(component):
            raise ModelError(f"{component.name} cannot be watched while it trains. Leave it out of the components.")
    modules = modules_of(model, components)
    activated = next(
        (path for path, *_ in find_activated(model) if any(name.startswith(path) for name in modules)), None
    )
    if activated is not None:
        raise ModelError(
            f"{activated} is an activated LoRA: it gathers the tokens of all examples, so none can be watched while it "
            "trains. Train it first, then use `vestige index` on the checkpoints."
        )
    if not by_function:
        return attach_all(modules.values(), receive)
    uses = FunctionUses(table_of(model, components), receive)
    return [*attach_all(modules.values(), receive, uses), *uses.around(model)]


class FunctionTap:
    """Intercepts a module's product or look-up where its own forward calls it: embeddings, convolutions, routers.

    Subclasses of Linear return something else (routers), of Embedding shift ids (OPT) or scale the rows (Gemma),
    convolutions cut or pad: whatever they do around it, the function that reads the weight has a rule.
    """

    def __init__(self, module: nn.Module, components: Mapping[str, int], receive: Callable[[], Receive]) -> None:
        kind = layer_kind(module) or "linear"
        self._owners = {role: (owner_of(number, kind, role),) for role, number in components.items()}
        self._module, self._receive = module, receive
        self._modes: list[FunctionUses] = []

    def attach(self) -> list[Handle]:
        """Place the two hooks between which the calls are intercepted."""
        return [
            self._module.register_forward_pre_hook(self._enter),
            self._module.register_forward_hook(self._leave, always_call=True),
        ]

    def _enter(self, module: nn.Module, inputs: Any) -> None:  # noqa: ARG002
        if not torch.is_grad_enabled():  # the first of two passes of a checkpointed block
            return
        own = {role: value for role, value in module._parameters.items() if value is not None and role in self._owners}
        table = {id(value): (value, self._owners[role]) for role, value in own.items()}
        rest = frozenset(map(id, (*module.buffers(), *module.parameters()))) - set(table)
        mode = FunctionUses(Table(table, rest), self._receive)
        mode.__enter__()
        self._modes.append(mode)

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:  # noqa: ARG002
        if self._modes:
            self._modes.pop().__exit__(None, None, None)


_TAPS: dict[LayerKind, Callable[..., Any]] = {
    "linear": LinearTap,
    "conv1d": LinearTap,
    "embedding": FunctionTap,
    "norm": NormTap,
    "convolution": FunctionTap,
    "relative_bias": RelativeBiasTap,
    "router": FunctionTap,
    "experts": ExpertsTap,
}


class ModuleUse(NamedTuple):
    """A module that holds selected parameters."""

    module: Any
    kind: LayerKind
    numbers: dict[str, int]
    """Role of a parameter -> number of its component."""

    def tap(self, receive: Callable[[], Receive]) -> Any:
        """Return the tap that watches this module; None for parameters that only functions read."""
        found = _TAPS.get(self.kind)
        if found is LinearTap and not self._is_plain():
            found = FunctionTap
        return None if found is None else found(self.module, self.numbers, receive)

    def follow(self, uses: FunctionUses, tap: Any) -> list[Handle]:
        """Place hooks that mark in `uses` when the module's forward runs."""
        takes: Takes = "function" if isinstance(tap, FunctionTap) else "module"
        if isinstance(tap, LinearTap):
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
        return self.kind == "conv1d" or type(self.module).forward is nn.Linear.forward


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
