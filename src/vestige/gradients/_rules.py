"""Layer rules: how each kind of module brings its activations and output gradients into the canonical factors."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.func import functional_call

from vestige.errors import ModelError
from vestige.gradients._types import Factor, FactorSink, PositionSink


class Receive(NamedTuple):
    """Sink of the running batch and its number of examples."""

    sink: FactorSink
    examples: int


@runtime_checkable
class Handle(Protocol):
    """Undoes one change to a module."""

    def remove(self) -> None:
        """Restore the module as it was."""
        ...


@runtime_checkable
class LayerTap(Protocol):
    """Hooks on one module that deliver the factors of its weight and bias."""

    def attach(self) -> Sequence[Handle]:
        """Place the hooks."""
        ...


def per_token(tensor: Tensor, examples: int) -> Shaped[Tensor, "example token side"]:
    """Return `[example, token, side]` from a layer's tensor: token axes are flattened, a missing one is added.

    Raises:
        ModelError: the first axis cannot be the batch.
    """
    if tensor.shape[0] % examples:
        raise ModelError(
            f"A selected layer works on a tensor of shape {tuple(tensor.shape)} in a batch of {examples} examples: its "
            "first axis is not the batch, so its gradient cannot be split by example. Leave the layer out with "
            "--components '!<name of the parameter>'."
        )
    return tensor.reshape(examples, -1, tensor.shape[-1])


def watch(output: Tensor, on_gradient: Callable[[Tensor], None]) -> None:
    """Call `on_gradient` with the output's gradient; starts the autograd graph here if nothing below needs it.

    Raises:
        ModelError: the output is not a tensor.
    """
    if not isinstance(output, Tensor):
        raise ModelError(
            f"A selected layer returns a {type(output).__name__}, not a tensor: there is no rule for it. Leave the "
            "layer out with --components '!<name of the parameter>'."
        )
    if not output.requires_grad:
        _StartGraph.apply(output, torch.zeros((), requires_grad=True))
    output.register_hook(on_gradient)


class _StartGraph(torch.autograd.Function):
    """Makes a tensor require its gradient without making it a leaf: a leaf could not be changed by ReLU in place."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, start: Tensor) -> Tensor:  # noqa: ARG004
        """Return the very same tensor, now with a history."""
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[None, None]:  # noqa: ARG004
        """Return no gradients: nothing lies below."""
        return None, None


class Kept(NamedTuple):
    """A value that a tap keeps from the forward to the backward pass, and the check that it is unchanged."""

    value: Any
    source: Tensor
    version: int

    def unchanged(self, what: str) -> Any:
        """Return the kept value.

        Raises:
            ModelError: an operation in place has overwritten it.
        """
        if isinstance(self.value, Tensor) and self.value._version != self.version and _same(self.value, self.source):
            raise ModelError(
                f"The input of {what} was changed in place after the layer had read it; training "
                "such a model fails too. Use the operation that returns a new tensor (`inplace=False`)."
            )
        return self.value


def keep(value: Any, source: Tensor) -> Kept:
    """Remember a value that may share memory with an activation."""
    return Kept(value, source, source._version)


def _same(value: Tensor, source: Tensor) -> bool:
    return value.untyped_storage().data_ptr() == source.untyped_storage().data_ptr()


def locate(sink: FactorSink, positions: Int[Tensor, "example row"]) -> None:
    """Pass on the tokens of the rows of the next factors, to a sink that counts them."""
    if isinstance(sink, PositionSink):
        sink.locate(positions)


def deliver(sink: FactorSink, component: int, examples: slice, left: Factor, right: Tensor) -> None:
    """Pass on both factors at once."""
    sink.accumulate(component, examples, sink.reduce(component, "left", left), sink.reduce(component, "right", right))


def deliver_vector(receive: Receive, component: int, gradient: Float[Tensor, "example token side"]) -> None:
    """Pass on the gradient of a vector: summed over tokens, as a matrix of one column."""
    total = gradient.sum(1, keepdim=True)
    deliver(receive.sink, component, slice(0, receive.examples), total, torch.ones_like(total[:, :, :1]))


class LinearTap:
    """Linear and GPT-2's Conv1D: left = output gradient, right = input activation."""

    def __init__(self, module: nn.Module, components: Mapping[str, int], receive: Callable[[], Receive]) -> None:
        self._module, self._receive = module, receive
        self._weight, self._bias = components.get("weight"), components.get("bias")

    def attach(self) -> Sequence[Handle]:
        """Place one forward hook, before any other; the backward one hangs on the output."""
        return [self._module.register_forward_hook(self._forward, prepend=True)]

    def _forward(self, module: nn.Module, inputs: Any, output: Any) -> None:  # noqa: ARG002
        if not torch.is_grad_enabled():  # the first of two passes of a checkpointed block
            return
        receive = self._receive()
        kept: Kept | None = None
        # A call on what is no batch, as DoRA's on an identity matrix, is refused once a gradient comes back from it.
        if self._weight is not None and inputs[0].shape[0] % receive.examples == 0:
            activation = per_token(inputs[0].detach(), receive.examples)
            kept = keep(receive.sink.reduce(self._weight, "right", activation), activation)
        watch(output, lambda gradient: self._backward(receive, kept, gradient))

    def _backward(self, receive: Receive, kept: Kept | None, gradient: Tensor) -> None:
        gradient = per_token(gradient, receive.examples)
        if self._weight is not None and kept is not None:
            left = receive.sink.reduce(self._weight, "left", gradient)
            receive.sink.accumulate(
                self._weight, slice(0, receive.examples), left, kept.unchanged(type(self._module).__name__)
            )
        if self._bias is not None:
            deliver_vector(receive, self._bias, gradient)


class NormTap:
    """LayerNorm, RMSNorm, GroupNorm, DoRA's magnitude: a scale's gradient is the output's times what it multiplies."""

    def __init__(self, module: nn.Module, components: Mapping[str, int], receive: Callable[[], Receive]) -> None:
        self._module, self._receive = module, receive
        self._weight, self._bias = components.get("weight"), components.get("bias")

    def attach(self) -> Sequence[Handle]:
        """Place one forward hook, before any other; the backward one hangs on the output."""
        return [self._module.register_forward_hook(self._forward, prepend=True, with_kwargs=True)]

    def _forward(self, module: nn.Module, inputs: Any, named: dict[str, Any], output: Any) -> None:
        if not torch.is_grad_enabled():
            return
        receive, activation = self._receive(), inputs[0].detach()
        kept = keep(activation, activation)
        watch(output, lambda gradient: self._backward(receive, module, kept, named, gradient))

    def _backward(
        self, receive: Receive, module: nn.Module, kept: Kept, named: dict[str, Any], gradient: Tensor
    ) -> None:
        if self._weight is not None:
            scaled = gradient * _normalised(module, kept.unchanged(type(module).__name__), named)
            deliver_vector(receive, self._weight, per_token(_features_last(module, scaled), receive.examples))
        if self._bias is not None:
            deliver_vector(receive, self._bias, per_token(_features_last(module, gradient), receive.examples))


def _features_last(module: nn.Module, tensor: Tensor) -> Tensor:
    """Move the features last: GroupNorm counts them along the second axis, the other norms along the last."""
    return tensor.movedim(1, -1) if isinstance(module, nn.GroupNorm) else tensor


def _normalised(module: nn.Module, activation: Tensor, named: dict[str, Any]) -> Tensor:
    """Return what the module multiplies its scale by: its output at scale one minus its output at scale zero.

    The module itself computes it, so that its own arithmetic (float32 inside, `1 + weight` in Gemma) is reproduced.
    """
    weight = module.get_parameter("weight")
    with torch.no_grad():
        at_one = functional_call(module, {"weight": torch.ones_like(weight)}, (activation,), named)
        at_zero = functional_call(module, {"weight": torch.zeros_like(weight)}, (activation,), named)
    return at_one - at_zero
