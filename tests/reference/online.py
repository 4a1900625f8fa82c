"""In-run products the slow way: one autograd call an example, dense Hessians, every subset tried."""

from collections.abc import Callable, Sequence
from itertools import combinations

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


def flat_gradient(loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
    return torch.cat([part.flatten() for part in found])


def sequence_loss(model: nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
    """Summed cross-entropy of one unpadded sequence."""
    logs = torch.log_softmax(model(input_ids=ids[None]).logits[0], -1)
    return torch.stack([-logs[t - 1, ids[t]] for t in range(1, len(ids)) if targets[t]]).sum()


def shares(model: nn.Module, data, rows: Sequence[int], parameters: Sequence[Tensor]) -> Tensor:
    """`[example, n]`: what each example adds to the gradient of the mean over all target tokens of the batch."""
    tokens = sum(int(data.targets[row][1:].sum()) for row in rows)
    losses = (sequence_loss(model, data.ids[row], data.targets[row]) / tokens for row in rows)
    return torch.stack([flat_gradient(loss, parameters) for loss in losses])


def validation_loss(model: nn.Module, data, rows: Sequence[int]) -> Tensor:
    """Mean over the examples of the mean over their target tokens."""
    parts = [sequence_loss(model, data.ids[row], data.targets[row]) / data.targets[row][1:].sum() for row in rows]
    return torch.stack(parts).mean()


def dense_hessian(model: nn.Module, loss: Callable[[nn.Module], Tensor], parameters: Sequence[Tensor]) -> Tensor:
    """`[n, n]`, row by row."""
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention cannot be differentiated twice
        gradient = torch.autograd.grad(loss(model), parameters, create_graph=True)
    flat = torch.cat([part.flatten() for part in gradient])
    rows = []
    for value in flat:
        row = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([part.flatten() for part in row]))
    return torch.stack(rows)


def value_of_subset(gains: Tensor, overlaps: Tensor, chosen: Sequence[int]) -> float:
    """`sum gain - sum over pairs of overlaps`: what greedy selection climbs."""
    return float(sum(gains[i] for i in chosen) - sum(overlaps[i, j] for i, j in combinations(chosen, 2)))


def greedy_by_brute_force(gains: Tensor, overlaps: Tensor, k: int) -> list[int]:
    """At each turn every remaining example is tried and the value of the whole set computed anew."""
    chosen: list[int] = []
    for _ in range(k):
        rest = [i for i in range(len(gains)) if i not in chosen]
        chosen.append(max(rest, key=lambda i: value_of_subset(gains, overlaps, [*chosen, i])))
    return chosen
