"""Measures of hidden states, layer by layer, as a work plan."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from vestige.audit._job import AuditJob
from vestige.audit._look import Tensors
from vestige.audit._mahalanobis import mahalanobis
from vestige.audit._measuring import LookPlan
from vestige.audit._pieces import ran
from vestige.audit._psmi import psmi
from vestige.audit._smi import smi
from vestige.audit._states import layer_files, layer_pieces
from vestige.folders import partial_folder
from vestige.launch import Compute, PieceFiles, step_done

SMI_DIRECTIONS = 200
_FEWEST = 2


@dataclass(frozen=True)
class LayerPlan:
    """One subject at one layer is one piece."""

    looked: LookPlan
    unit: str = "layers"

    @property
    def name(self) -> str:
        """The name of the work."""
        return self.looked.part.named("Layers")

    @property
    def job(self) -> AuditJob:
        """The examples and models under audit."""
        return self.looked.job

    @property
    def folder(self) -> Path:
        """Beside the run, until that is written."""
        return partial_folder(self.job.settings.out)

    @property
    def pieces(self) -> int:
        """Subjects times layers."""
        return len(self._numbers)

    def is_done(self, piece: int) -> bool:
        """Return whether the layer was measured."""
        return self.files.is_done(self._numbers[piece])

    def weight(self, piece: int) -> float:  # noqa: ARG002
        """Return 1, for one layer."""
        return 1

    @contextmanager
    def open(self) -> Iterator[Compute]:
        """Open the states, which are on disk."""

        def compute(piece: int) -> None:
            number, place = divmod(self._numbers[piece], len(self.job.layers))
            self.files.write(self._numbers[piece], self._measured(self.looked.states(number, self.job.layers[place])))
            step_done(1)

        yield compute

    def reduce(self) -> list[dict[int, Tensors]]:
        """Return for each subject, by layer, the measures of the examples.

        Raises:
            CorruptFile: A piece is missing or damaged.
        """
        part = self.looked.part
        return [
            dict(zip(self.job.layers, map(self.files.read, layer_pieces(self.job, number, number + 1)), strict=True))
            for number in range(part.first, part.end)
        ]

    def run(self) -> list[dict[int, Tensors]]:
        """Return the result; after a kill, the same call continues."""
        return ran(self)

    @cached_property
    def files(self) -> PieceFiles:
        """The files of the pieces."""
        return layer_files(self.job)

    @property
    def _numbers(self) -> range:
        return layer_pieces(self.job, self.looked.part.first, self.looked.part.end)

    def _measured(self, states: np.ndarray) -> Tensors:
        """Return PSMI of the data's own examples that have a class; distances of all from the data's own examples."""
        job, settings = self.job, self.job.settings
        finite = np.isfinite(states).all(1)
        own = finite & ~job.held_out
        found: dict[str, np.ndarray] = {}
        classed = own & (job.classes >= 0)
        some = classed.any() and np.bincount(job.classes[classed]).max() >= _FEWEST
        if "psmi" in job.wanted and not job.no_classes and some:
            values = psmi(states[classed], job.classes[classed], directions=settings.directions, seed=settings.seed)
            for name, part in zip(("psmi", "psmi_std", "psmi_low", "psmi_high"), values[:4], strict=True):
                found[name] = np.full(len(states), np.nan)
                found[name][classed] = part
            found["psmi_directions"] = np.array([values.directions, values.converged], dtype=np.float64)
        elif "psmi" in job.wanted:
            found["psmi"] = np.full(len(states), np.nan)
        if "mahalanobis" in job.wanted and own.sum() >= _FEWEST:
            found["mahalanobis"] = np.full(len(states), np.nan)
            found["mahalanobis"][finite] = mahalanobis(states[finite], states[own], dimensions=settings.dimensions)
        if ("smi" in job.wanted or settings.choose_layer == "smi") and not job.no_classes and some:
            directions = settings.directions or SMI_DIRECTIONS
            told = smi(states[classed], job.classes[classed], directions=directions, seed=settings.seed)
            found["smi"] = np.array(told, dtype=np.float64)
        return {name: torch.from_numpy(values) for name, values in {"layer": np.zeros(1), **found}.items()}
