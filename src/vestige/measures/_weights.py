"""How large weights are, and how far training has moved them; over the checkpoints of an audit, as a work plan."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vestige.errors import DataError
from vestige.launch import Compute, PieceFiles, step_done
from vestige.measures._job import AuditJob
from vestige.measures._look import Tensors
from vestige.measures._pieces import digest, ran
from vestige.measures._registry import measure
from vestige.measures._subjects import is_adapter
from vestige.storage import partial_folder

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


@dataclass(frozen=True)
class NormsPlan:
    """Norms of every subject's weights and of their change since the first."""

    job: AuditJob
    name: str = "Norms"
    unit: str = "models"

    @property
    def folder(self) -> Path:
        """Beside the run, until that is written."""
        return partial_folder(self.job.settings.out)

    @property
    def pieces(self) -> int:
        """Subjects."""
        return len(self.job.subjects)

    def is_done(self, piece: int) -> bool:
        """Return whether the subject's norms are there."""
        return self.files.is_done(piece)

    def weight(self, piece: int) -> float:  # noqa: ARG002
        """Return 1, for one model."""
        return 1

    @contextmanager
    def open(self) -> Iterator[Compute]:
        """Keep the first subject's weights for as long as others are compared with them."""
        start: dict[str, Tensor] = {}

        def compute(piece: int) -> None:
            if piece and not start:
                start.update(self._weights(0))
            weights = self._weights(piece)
            norms, _ = weight_norms(weights)
            found = {"norms": torch.tensor(norms, dtype=torch.float64)}
            if piece:
                found["change"] = torch.tensor(weight_norms(weights, start)[0], dtype=torch.float64)
            self.files.write(piece, found)
            step_done(1)

        yield compute

    def reduce(self) -> list[Tensors]:
        """Return norms, and change, of each subject.

        Raises:
            CorruptFile: One is missing or damaged.
        """
        return [self.files.read(piece) for piece in range(self.pieces)]

    def run(self) -> list[Tensors]:
        """Return the result; after a kill, the same call continues."""
        self.files.forget_damaged(range(self.pieces))
        return ran(self)

    @cached_property
    def files(self) -> PieceFiles:
        """The files of the pieces."""
        return PieceFiles(self.folder / "norms", digest(self.job, "norms"))

    def _weights(self, number: int) -> dict[str, Tensor]:
        """Return LoRA matrices if there are any, else every weight; copies, so that the model may be freed."""
        model = self.job.models.of(self.job.subjects[number].source).model
        adapter = is_adapter(model)
        return {
            name: weight.detach().cpu().clone()
            for name, weight in model.named_parameters()
            if not adapter or "lora_" in name
        }


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
def _norms_of_checkpoints(job: AuditJob) -> list[dict[str, dict[str, float]]]:
    """Return norms, and change, of each subject by name; nothing for a large model unless they were named."""
    if not (job.is_adapter or job.parameters <= SMALL_MODEL or "weights" in job.settings.measures):
        return [{} for _ in job.subjects]
    return [
        {name: WeightNorms(*values.tolist())._asdict() for name, values in sorted(each.items())}
        for each in NormsPlan(job).run()
    ]
