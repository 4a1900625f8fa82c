"""Convolutions in the canonical layout: a position is a token, an unfolded patch is its activation."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from vestige.gradients._rules import Handle, MatrixUse, Receive, Weight, add_gradients, keep, owner_of, watch


class Geometry(NamedTuple):
    """Position and extent of the kernel of a convolution."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]
    """As `torch.nn.functional.pad` takes it: last axis first, both sides."""
    padding_mode: str
    groups: int
    transposed: bool

    @classmethod
    def of_module(cls, module: _ConvNd) -> "Geometry":
        """Return the geometry of a module of PyTorch."""
        padding = tuple(int(amount) for amount in module._reversed_padding_repeated_twice)
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        transposed = isinstance(module, _ConvTransposeNd)
        return cls(module.kernel_size, module.stride, module.dilation, padding, mode, module.groups, transposed)

    @classmethod
    def of_call(
        cls,
        kernel: tuple[int, ...],
        transposed: bool,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,  # noqa: ARG003
        groups: int = 1,
        dilation: Any = 1,
    ) -> "Geometry":
        """Return the geometry of a call of `torch.nn.functional.conv1d` and its kin."""
        rank = len(kernel)
        stride, dilation = _each(stride, rank), _each(dilation, rank)
        if isinstance(padding, str):
            totals = [
                step * (size - 1) if padding == "same" else 0 for step, size in zip(dilation, kernel, strict=True)
            ]
            sides = [(total // 2, total - total // 2) for total in totals]
        else:
            sides = [(amount, amount) for amount in _each(padding, rank)]
        flat = tuple(amount for side in reversed(sides) for amount in side)
        return cls(kernel, stride, dilation, flat, "constant", groups, transposed)


class ConvolutionTap:
    """Convolutions of any rank, stride, padding and dilation; transposed ones with the two sides exchanged.

    The weight `[row, column, *kernel]` is read as `[row, column * kernel]`. Plain: rows are output channels, left =
    output gradient, right = unfolded input. Transposed: rows are input channels, left = input, right = unfolded output
    gradient (a transposed convolution is the adjoint of a plain one).

    With groups the gradient is a small block per group, so it is formed and handed over row by row, as the rows of an
    embedding are: `left` is one-hot.
    """

    def __init__(self, module: _ConvNd, components: Mapping[str, int], receive: Callable[[], Receive]) -> None:
        self._module, self._receive = module, receive
        self._owners = {role: owner_of(number, "convolution", role) for role, number in components.items()}

    def attach(self) -> Sequence[Handle]:
        """Place one forward hook, before any other; the backward one hangs on the output."""
        return [self._module.register_forward_hook(self._forward, prepend=True)]

    def _forward(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        if not torch.is_grad_enabled():  # the first of two passes of a checkpointed block
            return
        weight, bias = (
            Weight.of_parameter(module.get_parameter(role), (self._owners[role],)) if role in self._owners else None
            for role in ("weight", "bias")
        )
        geometry = Geometry.of_module(self._module)
        watch_convolution(self._receive(), weight, bias, geometry, inputs[0].detach(), output, type(module).__name__)


def watch_convolution(
    receive: Receive,
    weight: Weight | None,
    bias: Weight | None,
    geometry: Geometry,
    images: Float[Tensor, "image channel *space"],
    output: Tensor,
    name: str,
) -> None:
    """Deliver the gradients of a convolution that has just been computed."""
    grouped_rows, use, positions = geometry.groups > 1, None, images.shape[2:]
    kept = keep(None, images)
    if weight is not None:
        first = channels_last(images) if geometry.transposed else patches(geometry, images)
        first = first.reshape(receive.examples, -1, first.shape[-1])
        use = MatrixUse(receive, weight, (len(weight.tensor), weight.tensor[0].numel()))
        side = "left" if geometry.transposed else "right"
        kept = keep(first if grouped_rows else use.keep(side, first), images)

    def backward(gradient: Tensor) -> None:
        if weight is not None and use is not None:
            first = kept.get(name)
            second = patches(geometry, gradient, positions) if geometry.transposed else channels_last(gradient)
            second = second.reshape(receive.examples, -1, second.shape[-1])
            if grouped_rows:
                left, right = (first, second) if geometry.transposed else (second, first)
                add_gradients(receive, weight, multiply_groups(left, right, geometry.groups))
            else:
                other = use.keep("right" if geometry.transposed else "left", second)
                use.add(*((first, other) if geometry.transposed else (other, first)))
        if bias is not None:
            channels = channels_last(gradient)
            add_gradients(receive, bias, channels.reshape(receive.examples, -1, channels.shape[-1]).sum(1))

    watch(output, backward)


def channels_last(images: Float[Tensor, "image channel *space"]) -> Float[Tensor, "image position channel"]:
    """Return the positions in a row, as tokens."""
    return images.flatten(2).transpose(1, 2)


def patches(
    geometry: Geometry, images: Float[Tensor, "image channel *space"], positions: torch.Size | None = None
) -> Float[Tensor, "image position patch"]:
    """Return the input under the kernel at each of the first `positions` along each axis, channels first."""
    padding, mode = list(geometry.padding), geometry.padding_mode
    windows = torch.nn.functional.pad(images, padding, mode=mode) if any(padding) else images
    for axis, (size, stride, dilation) in enumerate(
        zip(geometry.kernel_size, geometry.stride, geometry.dilation, strict=True), start=2
    ):
        windows = windows.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
        if positions is not None:
            windows = windows.narrow(axis, 0, positions[axis - 2])
    rank = len(geometry.kernel_size)
    windows = windows.movedim(1, 1 + rank)  # [image, *position, channel, *kernel]
    return windows.reshape(len(images), -1, windows[0].shape[rank:].numel())


def multiply_groups(
    left: Float[Tensor, "example position row"], right: Float[Tensor, "example position patch"], groups: int
) -> Float[Tensor, "example row column"]:
    """Return the weight gradient of a grouped convolution: rows of a group meet that group's channels only."""
    blocks = torch.einsum("epgr,epgc->egrc", left.unflatten(2, (groups, -1)), right.unflatten(2, (groups, -1)))
    return blocks.flatten(1, 2)


def _each(value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    """Return one number for each axis."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * rank if len(values) == 1 else values
