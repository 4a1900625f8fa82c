"""Norms of weights as a work plan."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from vestige.audit._job import AuditJob
from vestige.audit._look import Tensors
from vestige.audit._pieces import digest, ran
from vestige.audit._subjects import is_adapter
from vestige.audit._weights import weight_norms
from vestige.folders import partial_folder
from vestige.launch import Compute, PieceFiles, step_done


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
