"""One forward and backward pass over a batch that hands the factors of every component to a sink."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vestige.errors import ModelError
from vestige.gradients._objective import Objective, example_count
from vestige.gradients._rule_convolution import ConvolutionTap
from vestige.gradients._rule_experts import ExpertsTap
from vestige.gradients._rule_look_up import EmbeddingTap, RelativeBiasTap, RouterTap
from vestige.gradients._rules import Handle, LayerTap, LinearTap, NormTap, Receive, deliver, locate, watch
from vestige.gradients._types import FactorSink
from vestige.models import Component
from vestige.timing import timed

_TAPS: dict[str, Callable[..., LayerTap]] = {
    "linear": LinearTap,
    "conv1d": LinearTap,
    "embedding": EmbeddingTap,
    "norm": NormTap,
    "convolution": ConvolutionTap,
    "relative_bias": RelativeBiasTap,
    "router": RouterTap,
    "experts": ExpertsTap,
}


class GradientPass:
    """Per-example gradients of the selected components, as factors, streamed while the backward pass runs.

    Use it as a context: hooks are placed on entry and removed on exit. Weights are frozen on entry and their flags
    restored on exit, so autograd computes no weight gradient, and the graph starts at the lowest selected component.

        with GradientPass(model, components, CausalLoss()) as gradient_pass:
            losses = gradient_pass.run(batch, sink)

    Every gradient is that of the example's own loss: no factor depends on the rest of the batch.
    """

    def __init__(self, model: nn.Module, components: Sequence[Component], objective: Objective) -> None:
        self._model = model
        self._components = tuple(components)
        self._objective = objective
        self._handles: list[Handle] = []
        self._flags: list[tuple[nn.Parameter, bool]] = []
        self._sink: FactorSink | None = None
        self._examples = 0
        self._head: tuple[int, ...] = ()

    def __enter__(self) -> "GradientPass":
        """Freeze the weights and place the hooks.

        Raises:
            ModelError: the examples of a batch cannot be told apart, because a BatchNorm is in training mode.
        """
        _refuse_batch_statistics(self._model)
        self._flags = [(parameter, parameter.requires_grad) for parameter in self._model.parameters()]
        for parameter, _ in self._flags:
            parameter.requires_grad_(False)
        for path, roles in self._roles_by_module().items():
            module = self._model.get_submodule(path)
            kind = roles[0][2]
            tap = _TAPS[kind](module, {role: number for role, number, _ in roles}, self._receive)
            self._handles += tap.attach()
        if _checkpointed(self._model):
            self._handles.append(_first_layer(self._model).register_forward_hook(_begin_graph))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
        self._flags.clear()

    def run(self, batch: Any, sink: FactorSink) -> Float[Tensor, "example"]:
        """Losses of the batch's examples; the sink has every factor when this returns.

        Raises:
            ModelError: no selected component takes part in the computation of the loss.
        """
        self._sink, self._examples = sink, example_count(batch)
        try:
            with torch.enable_grad():
                with timed("forward"):
                    losses = self._objective.losses(self._model, batch, self._tap_head if self._head else None)
                if losses.requires_grad:
                    with timed("backward"):
                        losses.sum().backward()
                elif not self._head:
                    raise ModelError("No selected component takes part in the loss: choose other --components.")
        finally:
            self._sink = None
        return losses.detach()

    def _roles_by_module(self) -> dict[str, list[tuple[str, int, str]]]:
        """Module path -> (role, component number, kind) for every hooked use; the split-off head is kept apart."""
        head = self._objective.head_module(self._model)
        roles: dict[str, list[tuple[str, int, str]]] = {}
        head_uses: dict[str, int] = {}
        for number, component in enumerate(self._components):
            for use in component.uses:
                if use.module == head:
                    head_uses[use.role] = number
                else:
                    roles.setdefault(use.module, []).append((use.role, number, use.kind))
        self._head = tuple(head_uses.get(role, -1) for role in ("weight", "bias")) if head_uses else ()
        return roles

    def _receive(self) -> Receive:
        assert self._sink is not None
        return Receive(self._sink, self._examples)

    def _tap_head(self, left: Tensor, right: Tensor, examples: slice, positions: Int[Tensor, "example row"]) -> None:
        assert self._sink is not None
        weight, bias = self._head
        if weight >= 0:
            locate(self._sink, positions)
            deliver(self._sink, weight, examples, left, right)
        if bias >= 0:
            total = left.sum(1, keepdim=True)
            deliver(self._sink, bias, examples, total, torch.ones_like(total[:, :, :1]))


def _refuse_batch_statistics(model: nn.Module) -> None:
    """A BatchNorm that uses the batch's own statistics makes every example's loss depend on the others."""
    for path, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise ModelError(
                f"{path} ({type(module).__name__}) normalises with the statistics of the batch, so no example has a "
                "gradient of its own. Call model.eval() first, or build the layer with track_running_stats=True."
            )


def _checkpointed(model: nn.Module) -> bool:
    blocks = (module for module in model.modules() if getattr(module, "gradient_checkpointing", False))
    return hasattr(model, "get_input_embeddings") and any(block.training for block in blocks)


def _first_layer(model: nn.Module) -> nn.Module:
    return model.get_input_embeddings()  # type: ignore[operator]


def _begin_graph(module: nn.Module, inputs: Any, output: Tensor) -> None:  # noqa: ARG001
    """Reentrant checkpointing differentiates a block only if its input asks for it, whatever happens inside."""
    watch(output, lambda gradient: None)  # noqa: ARG005
