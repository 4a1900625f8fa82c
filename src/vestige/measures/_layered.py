"""Measures of hidden states, layer by layer, as a work plan."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from vestige.launch import Compute, PieceFiles, step_done
from vestige.measures._inputs import States
from vestige.measures._job import AuditJob
from vestige.measures._look import Tensors
from vestige.measures._measuring import LookPlan
from vestige.measures._pieces import ran
from vestige.measures._registry import MEASURES
from vestige.measures._states import layer_files, layer_pieces
from vestige.storage import partial_folder


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

    def _measured(self, values: np.ndarray) -> Tensors:
        """Return the measures of states, fitted on the data's own examples; and what is known of the layer itself."""
        job, choice = self.job, self.job.settings.choose_layer
        measures = job.at("states")
        if choice != "last" and choice not in [each.name for each in measures]:
            measures.append(MEASURES.find(choice))
        states = States(values, job.held_out, job.classes, not job.no_classes, job.settings)
        found: dict[str, np.ndarray] = {"layer": np.zeros(1)}
        for each in measures:
            found |= each.columns(each.compute(states))
        return {name: torch.from_numpy(column) for name, column in found.items()}
