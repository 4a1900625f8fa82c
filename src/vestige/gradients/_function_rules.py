"""Rules for functions that read a weight: each gives every example's gradient of that weight."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional

from vestige.errors import ModelError
from vestige.gradients._factors import OneHot
from vestige.gradients._rule_convolution import Geometry, watch_convolution
from vestige.gradients._rules import MatrixUse, Receive, Weight, add_gradients, keep, per_token, watch


@runtime_checkable
class Uses(Protocol):
    """The mode that a rule queries about its arguments."""

    receive: Callable[[], Receive]

    def weight(self, tensor: Any) -> Weight | None:
        """Return what is known of a tensor that depends on parameters alone."""
        ...

    def shared(self, tensor: Tensor) -> bool:
        """Return whether a tensor is the same for every example."""
        ...


class UncoveredUse(Exception):
    """A use for which a rule cannot distinguish the examples; carries the numbers of the components."""


Rule = Callable[[Uses, Any, tuple, dict], Any]
"""Calls the function and watches its output; `NotImplemented` where the rule does not fit the arguments."""


def _read(uses: Uses, value: Any) -> Any:
    weight = uses.weight(value)
    return value if weight is None else weight.read()


def _linear(uses: Uses, func: Any, args: tuple, kwargs: dict) -> Any:
    named = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
    states, weight, bias = named["input"], named["weight"], named.get("bias")
    if uses.shared(states):
        return NotImplemented
    output = func(states, _read(uses, weight), _read(uses, bias))
    _watch_product(uses, uses.weight(weight), uses.weight(bias), states, output)
    return output


def _matmul(uses: Uses, func: Any, args: tuple, kwargs: dict) -> Any:
    if kwargs or len(args) != 2:
        return NotImplemented
    left, right = args
    weight, other = (uses.weight(right), left) if uses.weight(right) is not None else (uses.weight(left), right)
    if weight is None or weight.tensor.ndim != 2 or other.ndim < 2 or uses.shared(other):
        return NotImplemented
    output = func(_read(uses, left), _read(uses, right))
    if other is left:
        _watch_product(uses, weight.turned(), None, left, output)
    else:
        _watch_product(uses, weight, None, right, output, columns=True)
    return output


def _addmm(uses: Uses, func: Any, args: tuple, kwargs: dict) -> Any:
    if kwargs or len(args) != 3 or uses.weight(args[2]) is None or uses.shared(args[1]) or args[0].ndim != 1:
        return NotImplemented
    output = func(*(_read(uses, value) for value in args))
    weight = uses.weight(args[2])
    _watch_product(uses, None if weight is None else weight.turned(), uses.weight(args[0]), args[1], output)
    return output


def _watch_product(
    uses: Uses, weight: Weight | None, bias: Weight | None, states: Tensor, output: Tensor, columns: bool = False
) -> None:
    """Watch `output = states @ weight.T + bias`; with `columns` the tokens of both are columns, not rows."""
    receive = uses.receive()
    use = right = None
    if weight is not None:
        activation = states.detach().mT if columns else states.detach()
        activation = per_token(activation, receive.examples)
        use = MatrixUse(receive, weight, (weight.tensor.shape[0], weight.tensor.shape[1]))
        right = keep(use.keep("right", activation), activation)

    def backward(gradient: Tensor) -> None:
        gradient = per_token(gradient.mT if columns else gradient, receive.examples)
        if use is not None and right is not None:
            use.add(use.keep("left", gradient), right.unchanged("a product"))
        if bias is not None:
            add_gradients(receive, bias, gradient.sum(1))

    watch(output, backward)


def _convolution(uses: Uses, func: Any, args: tuple, kwargs: dict) -> Any:
    transposed = "transpose" in func.__name__
    order = ("output_padding", "groups", "dilation") if transposed else ("dilation", "groups")
    named = dict(zip(("input", "weight", "bias", "stride", "padding", *order), args, strict=False)) | kwargs
    images, weight, bias = named.pop("input"), named.pop("weight"), named.pop("bias", None)
    if uses.shared(images) or images.ndim != weight.ndim:
        return NotImplemented
    output = func(images, _read(uses, weight), _read(uses, bias), **named)
    geometry = Geometry.of_call(tuple(weight.shape[2:]), transposed, **named)
    watch_convolution(
        uses.receive(), uses.weight(weight), uses.weight(bias), geometry, images.detach(), output, "a convolution"
    )
    return output


def _embedding(uses: Uses, func: Any, args: tuple, kwargs: dict) -> Any:
    named = dict(zip(("input", "weight", "padding_idx"), args, strict=False)) | kwargs
    ids, table = named.pop("input"), named.pop("weight")
    weight, rest = uses.weight(table), args[3:]
    if weight is None or func is not functional.embedding:
        return NotImplemented
    receive = uses.receive()
    shared, ids = ids, with_batch_axis(ids, receive.examples)
    if weight.training and ids is not shared:
        # A weight in training: adding the rows to those of every example sums their gradients over the batch before
        # the look-up is differentiated. Expanding the rows does the same, bit for bit; expanding the ids does not.
        output = func(shared, weight.read(), named.pop("padding_idx", None), *rest, **named)
        output, padding = output.expand(*ids.shape, -1), args[2] if len(args) > 2 else kwargs.get("padding_idx")
    else:
        padding = named.pop("padding_idx", None)
        output = func(ids, weight.read(), padding, *rest, **named)
    use = MatrixUse(receive, weight, (weight.tensor.shape[0], weight.tensor.shape[1]))
    rows = per_token(ids[..., None], receive.examples)[..., 0]
    left = use.keep("left", OneHot(rows, weight.tensor.shape[0]))

    def backward(gradient: Tensor) -> None:
        if padding is not None:  # the row of `padding_idx` is never trained
            gradient = gradient.masked_fill((ids == padding)[..., None], 0)
        use.add(left, use.keep("right", per_token(gradient, receive.examples)))

    watch(output, backward)
    return output


def _elementwise(uses: Uses, func: Any, args: tuple, kwargs: dict) -> Any:
    """Call a sum or product of activations and a weight that is spread over them, and watch its output."""
    if kwargs or len(args) != 2 or not all(isinstance(value, Tensor) for value in args):
        return NotImplemented
    first, second = args
    weight, other = (uses.weight(second), first) if uses.weight(second) is not None else (uses.weight(first), second)
    if weight is None or uses.shared(other) or other.ndim < weight.tensor.ndim:
        return NotImplemented
    product = "mul" in func.__name__
    receive, values = uses.receive(), other.detach()
    kept = keep(values.clone() if product and func.__name__ == "__imul__" else values, values)
    output = func(_read(uses, first), _read(uses, second))

    def backward(gradient: Tensor) -> None:
        scaled = gradient * kept.unchanged("a product") if product else gradient
        add_gradients(receive, weight, _summed(scaled, weight, receive.examples))

    watch(output, backward)
    return output


def _summed(gradient: Tensor, weight: Weight, examples: int) -> Tensor:
    """Return `[example, *weight]`: the gradient of a sum or product, summed over all that the weight was spread to."""
    shape = weight.tensor.shape
    flat = per_token(gradient.flatten(1) if gradient.ndim > 1 else gradient[:, None], examples)
    gradient = flat.reshape(examples, -1, *gradient.shape[1:])
    trailing = shape[max(0, len(shape) - gradient.ndim + 2) :]
    if any(size != 1 for size in shape[: len(shape) - len(trailing)]):  # it has an entry for each example
        raise UncoveredUse([owner.component for owners in weight.owners for owner in owners])
    gradient = gradient.flatten(1, gradient.ndim - 1 - len(trailing)).sum(1)
    for axis, size in enumerate(trailing, start=1):
        if size == 1:
            gradient = gradient.sum(axis, keepdim=True)
    return gradient


def with_batch_axis(ids: Tensor, examples: int) -> Tensor:
    """Return ids whose first axis is the batch: those shared by all examples are expanded.

    Raises:
        ModelError: it is unknown whether `[token]` ids are positions shared by the batch or one id an example.
    """
    if examples == 1 or ids.ndim == 0:
        return ids
    if ids.ndim == 1 and len(ids) != examples:
        return ids.expand(examples, -1)
    if ids.ndim == 1 and torch.equal(ids, torch.arange(examples, device=ids.device)):
        raise ModelError(
            f"An embedding is given the ids 0 to {examples - 1} without a batch axis in a batch of {examples}: "
            "they may be positions or one id per example. Give positions the shape [1, token]."
        )
    return ids.expand(examples, *ids.shape[1:]) if ids.ndim > 1 and ids.shape[0] == 1 else ids


_CONVOLUTIONS = (
    functional.conv1d,
    functional.conv2d,
    functional.conv3d,
    functional.conv_transpose1d,
    functional.conv_transpose2d,
    functional.conv_transpose3d,
)
PRODUCTS = frozenset((functional.linear, torch.addmm, *_CONVOLUTIONS))
"""What the forward of a linear layer or a convolution calls once."""

RULES: dict[Any, Rule] = (
    {functional.linear: _linear, functional.embedding: _embedding, torch.addmm: _addmm}
    | dict.fromkeys(_CONVOLUTIONS, _convolution)
    | dict.fromkeys((torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__), _matmul)
    | dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__), _elementwise)
    | dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, Tensor.__imul__), _elementwise)
)
