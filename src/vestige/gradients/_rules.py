"""Layer rules: how each kind of module brings its activations and output gradients into the canonical factors."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from vestige.gradients._types import FactorSink, OneHot


class Receive(NamedTuple):
    """Where the factors of the running batch go."""

    sink: FactorSink
    examples: int


@runtime_checkable
class LayerTap(Protocol):
    """Hooks on one module that deliver the factors of its weight and bias."""

    def attach(self) -> list[RemovableHandle]:
        """Place the hooks."""
        ...


def per_token(tensor: Tensor, examples: int) -> Float[Tensor, "example token side"]:
    """`[example, token, side]` from what a layer saw: token axes are flattened, a missing one is added."""
    return tensor.reshape(examples, -1, tensor.shape[-1])


def watch(output: Tensor, on_gradient: Callable[[Tensor], None]) -> None:
    """Call `on_gradient` with the output's gradient; starts the autograd graph here if nothing below needs it."""
    if not output.requires_grad:
        output.requires_grad_()
    output.register_hook(on_gradient)


def deliver_vector(receive: Receive, component: int, gradient: Float[Tensor, "example token side"]) -> None:
    """Hand over the gradient of a vector: summed over tokens, as a matrix of one column."""
    total = gradient.sum(1, keepdim=True)
    one = torch.ones_like(total[:, :, :1])
    sink = receive.sink
    left, right = sink.reduce(component, "left", total), sink.reduce(component, "right", one)
    sink.accumulate(component, slice(0, receive.examples), left, right)


class LinearTap:
    """Linear and GPT-2's Conv1D: left = output gradient, right = input activation."""

    def __init__(self, module: nn.Module, components: Mapping[str, int], receive: Callable[[], Receive]) -> None:
        self._module, self._receive = module, receive
        self._weight, self._bias = components.get("weight"), components.get("bias")

    def attach(self) -> list[RemovableHandle]:
        """One forward hook; the backward one hangs on the output."""
        return [self._module.register_forward_hook(self._forward)]

    def _forward(self, module: nn.Module, inputs: Any, output: Any) -> None:  # noqa: ARG002
        receive = self._receive()
        kept: Any = None
        if self._weight is not None:
            activation = per_token(inputs[0].detach(), receive.examples)
            kept = receive.sink.reduce(self._weight, "right", activation)
        watch(output, lambda gradient: self._backward(receive, kept, gradient))

    def _backward(self, receive: Receive, kept: Any, gradient: Tensor) -> None:
        gradient = per_token(gradient, receive.examples)
        if self._weight is not None:
            left = receive.sink.reduce(self._weight, "left", gradient)
            receive.sink.accumulate(self._weight, slice(0, receive.examples), left, kept)
        if self._bias is not None:
            deliver_vector(receive, self._bias, gradient)


class NormTap:
    """LayerNorm and RMSNorm: the scale's gradient is the output gradient times the normalised input."""

    def __init__(self, module: nn.Module, components: Mapping[str, int], receive: Callable[[], Receive]) -> None:
        self._module, self._receive = module, receive
        self._weight, self._bias = components.get("weight"), components.get("bias")

    def attach(self) -> list[RemovableHandle]:
        """One forward hook; the backward one hangs on the output."""
        return [self._module.register_forward_hook(self._forward)]

    def _forward(self, module: nn.Module, inputs: Any, output: Any) -> None:
        receive, activation = self._receive(), inputs[0].detach()
        watch(output, lambda gradient: self._backward(receive, module, activation, gradient))

    def _backward(self, receive: Receive, module: nn.Module, activation: Tensor, gradient: Tensor) -> None:
        if self._weight is not None:
            scaled = gradient * _normalised(module, activation)
            deliver_vector(receive, self._weight, per_token(scaled, receive.examples))
        if self._bias is not None:
            deliver_vector(receive, self._bias, per_token(gradient, receive.examples))


def _normalised(module: nn.Module, activation: Tensor) -> Tensor:
    """What the module multiplies its scale by: its output at scale one minus its output at scale zero.

    The module itself is asked, so that its own arithmetic (float32 inside, `1 + weight` in Gemma) is reproduced.
    """
    weight = module.get_parameter("weight")
    with torch.no_grad():
        at_one = functional_call(module, {"weight": torch.ones_like(weight)}, (activation,))
        at_zero = functional_call(module, {"weight": torch.zeros_like(weight)}, (activation,))
    return at_one - at_zero


class EmbeddingTap:
    """Embedding: left = one-hot of the token, right = output gradient.

    The look-up itself is intercepted, not the module: subclasses shift the ids first (OPT) or scale the result after
    it (Gemma). Ids that are shared by the batch (`[1, token]` positions) are expanded, or their gradients would
    arrive summed over the examples.
    """

    def __init__(self, module: nn.Module, components: Mapping[str, int], receive: Callable[[], Receive]) -> None:
        self._module, self._receive = module, receive
        self._weight = components["weight"]
        self._mode: _LookUp | None = None

    def attach(self) -> list[RemovableHandle]:
        """The look-up is intercepted between the two hooks."""
        return [
            self._module.register_forward_pre_hook(self._enter),
            self._module.register_forward_hook(self._leave, always_call=True),
        ]

    def _enter(self, module: nn.Module, inputs: Any) -> None:  # noqa: ARG002
        self._mode = _LookUp(self._weight, self._receive())
        self._mode.__enter__()

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:  # noqa: ARG002
        mode, self._mode = self._mode, None
        if mode is not None:
            mode.__exit__(None, None, None)


class _LookUp(TorchFunctionMode):
    """Sees the one call of `embedding` inside an embedding module."""

    def __init__(self, component: int, receive: Receive) -> None:
        super().__init__()
        self._component, self._receive = component, receive

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.nn.functional.embedding:
            return func(*args, **kwargs)
        ids, weight, *rest = args
        receive, component = self._receive, self._component
        if ids.shape[0] == 1 and receive.examples > 1:
            ids = ids.expand(receive.examples, *ids.shape[1:])
        output = func(ids, weight, *rest, **kwargs)
        padding = rest[0] if rest else kwargs.get("padding_idx")
        left = receive.sink.reduce(component, "left", OneHot(ids.reshape(receive.examples, -1), weight.shape[0]))
        watch(output, lambda gradient: self._backward(left, gradient, None if padding is None else ids == padding))
        return output

    def _backward(self, left: Any, gradient: Tensor, ignored: Tensor | None) -> None:
        receive, component = self._receive, self._component
        if ignored is not None:  # the row of `padding_idx` is never trained
            gradient = gradient.masked_fill(ignored[..., None], 0)
        right = receive.sink.reduce(component, "right", per_token(gradient, receive.examples))
        receive.sink.accumulate(component, slice(0, receive.examples), left, right)
