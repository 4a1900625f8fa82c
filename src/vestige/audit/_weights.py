"""How large weights are, and how far training has moved them."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from vestige.errors import DataError


class WeightNorms(NamedTuple):
    """Norms of one tensor as a matrix, or their mean over tensors weighted by numbers of parameters."""

    frobenius: float
    nuclear: float
    """Sum of the singular values."""
    largest: float
    """Largest absolute entry."""
    spectral: float
    """Largest singular value."""


def weight_norms(
    weights: Mapping[str, Tensor], start: Mapping[str, Tensor] | None = None
) -> tuple[WeightNorms, dict[str, WeightNorms]]:
    """Return norms of the weights, or of their change since `start`: the weighted mean, and those of each tensor.

    Args:
        weights: By name, such as the LoRA matrices of a checkpoint. More than two axes become [first, all others].
        start: The same tensors at an earlier checkpoint.

    Raises:
        DataError: No weights, or names or shapes that differ from those at the start.
    """
    if not weights:
        raise DataError("There are no weights to measure.")
    if start is not None and {name: each.shape for name, each in weights.items()} != {
        name: each.shape for name, each in start.items()
    }:
        different = sorted(weights.keys() ^ start.keys())[:3] or ["shapes"]
        raise DataError(f"The two checkpoints do not hold the same tensors: {', '.join(different)}.")
    each = {
        name: _norms(tensor.double() if start is None else tensor.double() - start[name].double())
        for name, tensor in weights.items()
    }
    total = sum(tensor.numel() for tensor in weights.values())
    shares = [weights[name].numel() / total for name in each]
    mean = [
        sum(share * value for share, value in zip(shares, column, strict=True))
        for column in zip(*each.values(), strict=True)
    ]
    return WeightNorms(*mean), each


def _norms(tensor: Tensor) -> WeightNorms:
    matrix = tensor.reshape(len(tensor), -1) if tensor.ndim > 1 else tensor.reshape(1, -1)
    values = torch.linalg.svdvals(matrix)
    return WeightNorms(
        float(values.square().sum().sqrt()), float(values.sum()), float(matrix.abs().amax()), float(values.amax())
    )
