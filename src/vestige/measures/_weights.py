"""How large the weights of each checkpoint are, and how far training has moved them."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from vestige.errors import DataError
from vestige.measures._job import AuditJob, is_adapter
from vestige.measures._measure import measure
from vestige.measures._pieces import Tensors, piece_files, run_audit_pieces

SMALL_MODEL = 30_000_000
"""Weights of a whole model whose norms are taken without being requested."""


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
    sides = (weights, weights if start is None else start)
    shapes, before = ({name: each.shape for name, each in side.items()} for side in sides)
    if shapes != before:
        different = sorted(shapes.keys() ^ before.keys())[:3] or ["shapes"]
        raise DataError(f"The two checkpoints do not hold the same tensors: {', '.join(different)}.")
    each = {
        name: _norms(tensor.double() if start is None else tensor.double() - start[name].double())
        for name, tensor in weights.items()
    }
    total = sum(tensor.numel() for tensor in weights.values())
    shares = [tensor.numel() / total for tensor in weights.values()]
    columns = zip(*each.values(), strict=True)
    mean = [sum(share * value for share, value in zip(shares, column, strict=True)) for column in columns]
    return WeightNorms(*mean), each


def _norms(tensor: Tensor) -> WeightNorms:
    matrix = tensor.reshape(len(tensor), -1) if tensor.ndim > 1 else tensor.reshape(1, -1)
    values = torch.linalg.svdvals(matrix)
    return WeightNorms(
        float(values.square().sum().sqrt()), float(values.sum()), float(matrix.abs().amax()), float(values.amax())
    )


def _compute_norms(job: AuditJob) -> list[Tensors]:
    """Measure each checkpoint's weights, and their change since the first."""
    start: dict[str, Tensor] = {}

    def read_weights(number: int) -> dict[str, Tensor]:
        """Return LoRA matrices if there are any, else every weight; copies, so that the model may be freed."""
        model = job.models.of(job.subjects[number].source).model
        chosen = "lora_" if is_adapter(model) else ""
        return {name: one.detach().cpu().clone() for name, one in model.named_parameters() if chosen in name}

    def compute(number: int) -> Tensors:
        if number and not start:
            start.update(read_weights(0))
        weights = read_weights(number)
        found = {"norms": torch.tensor(weight_norms(weights)[0], dtype=torch.float64)}
        if number:
            found["change"] = torch.tensor(weight_norms(weights, start)[0], dtype=torch.float64)
        return found

    files = piece_files(job, "norms", "norms")
    return run_audit_pieces(job, "Norms", "models", files, range(len(job.subjects)), compute)


@measure(
    "weights",
    "norms of the weights and of their change (of a checkpoint)",
    stage="weights",
    needs=("weights",),
    of="checkpoint",
    missing=lambda job: f"{job.parameters:,} weights: ask for them by name, --measures default weights",
    cost="a singular value decomposition of every weight; larger models only when named",
    limits="of a whole model: says nothing about a single example",
    order=150,
)
def _weights(job: AuditJob) -> list[dict[str, dict[str, float]]]:
    """Return norms, and change, of each subject by name; nothing for a large model unless they were named."""
    if not (job.is_adapter or job.parameters <= SMALL_MODEL or "weights" in job.settings.measures):
        return [{} for _ in job.subjects]
    return [
        {name: WeightNorms(*values.tolist())._asdict() for name, values in sorted(each.items())}
        for each in _compute_norms(job)
    ]
