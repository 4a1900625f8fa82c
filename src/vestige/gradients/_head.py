"""The output head outside autograd: losses of positions, and what they pass back to the hidden states."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vestige.data import send

HeadTap = Callable[[Tensor, Tensor, slice, Tensor], None]
"""Receives the factors of the output head, chunk by chunk, while the loss is computed: left `[example, row, out]`,
right `[example, row, in]`, the batch's examples that they belong to, and the tokens of the rows `[example, row]`, -1
for a row that only fills the tensor."""


class Targets(NamedTuple):
    """Positions that carry a label, flattened over the batch, examples in order.

    They are found on the CPU and sent to the device in one copy: to search them there would make the CPU wait for it.
    """

    owner: Int[Tensor, "position"]
    """Example of each, on the CPU; everything else is on the device."""
    place: Int[Tensor, "position"]
    """Row of the hidden states `[example * token]` that predicts it."""
    labels: Int[Tensor, "position"]
    example: Int[Tensor, "position"]
    token: Int[Tensor, "position"]
    counts: Int[Tensor, "example"]
    weights: Float[Tensor, "position"]
    """1, or one over the example's number of targets; times what the batch gives the token."""


def sum_by_example(values: Float[Tensor, "position"], counts: Int[Tensor, "example"]) -> Float[Tensor, "example"]:
    """Return the sums over each example's values, which follow one another, added in this order on every device."""
    return torch.segment_reduce(values, "sum", lengths=counts, unsafe=True)


class HeadLoss(torch.autograd.Function):
    """Losses `[example]` from hidden states; the hidden states' gradient is computed on the way forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Targets,
        step: int,
        head_tap: HeadTap | None,
    ):
        """Compute logits, loss, softmax gradient, and that times the head's weight, `step` positions at a time."""
        states = hidden.flatten(0, 1).index_select(0, targets.place)
        gradients = torch.empty_like(states)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        losses = torch.empty(len(states), dtype=wide, device=hidden.device)
        for start in range(0, len(states), step):
            part = slice(start, start + step)
            logits = torch.nn.functional.linear(states[part], weight, bias)
            rows = torch.arange(len(logits), device=logits.device)
            labels, scale = targets.labels[part], targets.weights[part].to(wide)
            if logits.device.type == "cuda":
                losses[part], slope = _slope_on_card(logits, rows, labels, scale)
            else:
                logits = logits.to(wide)
                highest = logits.amax(1, keepdim=True)
                picked = logits[rows, labels]
                slope = logits.sub_(highest).exp_()
                total = slope.sum(1)
                losses[part] = (total.log() + highest[:, 0] - picked) * scale
                share = (scale / total)[:, None]
                if weight.dtype == wide and head_tap is None:
                    # Dividing the product touches fewer numbers, and without the label's own large term the sum over
                    # the vocabulary loses no digits to it, however it is ordered.
                    gradients[part] = (slope @ weight).mul_(share) - weight[labels] * scale[:, None]
                    continue
                slope = slope.mul_(share)
                slope[rows, labels] -= scale
                slope = slope.to(weight.dtype)
            gradients[part] = slope @ weight
            if head_tap is not None:
                _tap_head(head_tap, slope, states[part], targets.owner[part], targets.token[part])
        ctx.place, ctx.example, ctx.shape = targets.place, targets.example, hidden.shape
        ctx.save_for_backward(gradients)
        return sum_by_example(losses, targets.counts)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        """Scatter the stored gradients to their positions."""
        (gradients,) = ctx.saved_tensors
        full = gradients.new_zeros(ctx.shape)
        full.flatten(0, 1)[ctx.place] = gradients * outer[0].to(gradients.dtype)[ctx.example, None]
        return full, None, None, None, None, None


def _slope_on_card(
    logits: Float[Tensor, "position word"],
    rows: Int[Tensor, "position"],
    labels: Int[Tensor, "position"],
    scale: Float[Tensor, "position"],
) -> tuple[Float[Tensor, "position"], Float[Tensor, "position word"]]:
    """Return losses, and their slope in the memory of the logits, which on a card is read and written most of all.

    PyTorch's own kernel finds the largest logit and the sum together. In separate steps, which are faster on a CPU, a
    number of bfloat16 would move 44 bytes in place of 28.
    """
    chances = torch.log_softmax(logits, 1, dtype=scale.dtype)
    picked = chances[rows, labels]
    slope = torch.mul(chances.exp_(), scale[:, None], out=logits)
    # From float32: in the logits' own format, a probability near 1 less 1 would have no digit left.
    slope[rows, labels] = (picked.expm1() * scale).to(slope.dtype)
    return picked * -scale, slope


def _tap_head(head_tap: HeadTap, slope: Tensor, states: Tensor, owner: Tensor, token: Tensor) -> None:
    """Pass a flat chunk on as `[example, token, ...]`, padded with zeros to its longest example; `owner` on the CPU."""
    first, last = int(owner[0]), int(owner[-1])
    counts = torch.bincount(owner - first)
    starts = counts.cumsum(0) - counts
    shape = (last - first + 1, int(counts.max()))
    row = (owner - first) * shape[1] + torch.arange(len(owner)) - starts[owner - first]
    row = send(row, slope.device)
    left, right = slope.new_zeros(*shape, slope.shape[1]), states.new_zeros(*shape, states.shape[1])
    positions = token.new_full(shape, -1)
    for whole, part in ((left, slope), (right, states), (positions, token)):
        whole.flatten(0, 1)[row] = part
    head_tap(left, right, slice(first, last + 1), positions)
