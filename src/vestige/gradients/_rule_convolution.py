"""Convolutions in the canonical layout: a position is a token, an unfolded patch is its activation."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from vestige.gradients._rules import Handle, Kept, Receive, deliver, deliver_vector, keep, watch
from vestige.gradients._types import OneHot


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
        self._weight, self._bias = components.get("weight"), components.get("bias")
        self._transposed = isinstance(module, _ConvTransposeNd)

    def attach(self) -> Sequence[Handle]:
        """One forward hook; the backward one hangs on the output."""
        return [self._module.register_forward_hook(self._forward)]

    def _forward(self, module: nn.Module, inputs: Any, output: Tensor) -> None:  # noqa: ARG002
        if not torch.is_grad_enabled():  # the first of two passes of a checkpointed block
            return
        receive, activation = self._receive(), inputs[0].detach()
        kept, positions = keep(None, activation), activation.shape[2:]
        if self._weight is not None:
            side = "left" if self._transposed else "right"
            factor = channels_last(activation) if self._transposed else patches(self._module, activation)
            factor = factor.reshape(receive.examples, -1, factor.shape[-1])
            reduced = factor if self._module.groups > 1 else receive.sink.reduce(self._weight, side, factor)
            kept = keep(reduced, activation)
        watch(output, lambda gradient: self._backward(receive, kept, positions, gradient))

    def _backward(self, receive: Receive, kept: Kept, positions: torch.Size, gradient: Tensor) -> None:
        everyone = slice(0, receive.examples)
        if self._weight is not None:
            sink, first = receive.sink, kept.unchanged(self._module)
            second = patches(self._module, gradient, positions) if self._transposed else channels_last(gradient)
            second = second.reshape(receive.examples, -1, second.shape[-1])
            if self._module.groups > 1:
                left, right = (first, second) if self._transposed else (second, first)
                rows = grouped(left, right, self._module.groups)
                ids = torch.arange(rows.shape[1], device=rows.device).expand(receive.examples, -1)
                deliver(sink, self._weight, everyone, OneHot(ids, rows.shape[1]), rows)
            else:
                other = sink.reduce(self._weight, "right" if self._transposed else "left", second)
                left, right = (first, other) if self._transposed else (other, first)
                sink.accumulate(self._weight, everyone, left, right)
        if self._bias is not None:
            channels = channels_last(gradient)
            deliver_vector(receive, self._bias, channels.reshape(receive.examples, -1, channels.shape[-1]))


def channels_last(images: Float[Tensor, "image channel *space"]) -> Float[Tensor, "image position channel"]:
    """Positions in a row, as tokens."""
    return images.flatten(2).transpose(1, 2)


def patches(
    module: _ConvNd, images: Float[Tensor, "image channel *space"], positions: torch.Size | None = None
) -> Float[Tensor, "image position patch"]:
    """What the kernel sees at each position, channels first; the first `positions` along each axis."""
    padding = [int(amount) for amount in module._reversed_padding_repeated_twice]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    windows = torch.nn.functional.pad(images, padding, mode=mode) if any(padding) else images
    for axis, (size, stride, dilation) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True), start=2
    ):
        windows = windows.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
        if positions is not None:
            windows = windows.narrow(axis, 0, positions[axis - 2])
    rank = len(module.kernel_size)
    windows = windows.movedim(1, 1 + rank)  # [image, *position, channel, *kernel]
    return windows.reshape(len(images), -1, windows[0].shape[rank:].numel())


def grouped(
    left: Float[Tensor, "example position row"], right: Float[Tensor, "example position patch"], groups: int
) -> Float[Tensor, "example row column"]:
    """The weight gradient of a grouped convolution: rows of a group meet that group's channels only."""
    blocks = torch.einsum("epgr,epgc->egrc", left.unflatten(2, (groups, -1)), right.unflatten(2, (groups, -1)))
    return blocks.flatten(1, 2)
