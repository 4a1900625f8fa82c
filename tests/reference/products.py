"""Inner products of per-example gradients written out: every gradient by autograd, alone, flattened and multiplied."""

import torch
from torch import Tensor


def gram_by_parameter(rows: list[dict[str, Tensor]], others: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """`[row, other]` for every parameter, in float64."""
    return {
        name: torch.stack([row[name].double().flatten() for row in rows])
        @ torch.stack([other[name].double().flatten() for other in others]).T
        for name in rows[0]
    }


def closest_of_rank(matrix: Tensor, rank: int) -> Tensor:
    """The best approximation of a rank: all singular values after the first `rank` set to zero."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values[rank:] = 0
    return left @ values.diag() @ right
