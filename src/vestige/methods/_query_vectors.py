"""The query vectors of a run in pieces: made by one process, kept beside the run, and read by all others."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, final

import torch

from vestige.distributed import broadcast_from_rank0
from vestige.launch import Compute, PieceFiles, run_plan
from vestige.methods._prepared import Prepared
from vestige.methods._stores import Vectors
from vestige.settings import LaunchSettings


class KeptVectors(NamedTuple):
    """The vectors, and whether products with them are to be divided by the example's length."""

    vectors: Vectors
    cosine: bool


@final
@dataclass(frozen=True)
class QueryVectors:
    """A plan of one piece: of several processes that start together, one writes and all read the same bytes.

    Computed twice they may be rounded differently, and scores of one run must come from the same vectors.
    """

    folder: Path
    files: PieceFiles
    queries: int
    prepare: Callable[[], Prepared]
    device: torch.device
    name: str = "Queries"
    unit: str = "queries"
    pieces: int = 1

    def is_done(self, piece: int) -> bool:
        """Return whether the vectors are there."""
        return self.files.is_done(piece)

    def weight(self, piece: int) -> float:  # noqa: ARG002
        """Return the number of queries."""
        return self.queries

    def open(self) -> AbstractContextManager[Compute]:
        """Open nothing: what is needed was made before."""
        return nullcontext(self._compute)

    def _compute(self, piece: int) -> None:
        prepared = self.prepare()
        vectors = {str(number): vector for number, vector in enumerate(prepared.vectors)}
        self.files.write(piece, {"cosine": torch.tensor(prepared.cosine), **vectors})

    def reduce(self) -> KeptVectors:
        """Read the kept vectors.

        Raises:
            CorruptFile: it is damaged.
        """
        kept = self.files.read(0)
        cosine = bool(kept.pop("cosine"))
        return KeptVectors([kept[str(number)].to(self.device) for number in range(len(kept))], cosine)

    def run(self) -> KeptVectors:
        """Return the vectors, made in this process unless they are there already."""
        self.files.forget_damaged([0])
        if not broadcast_from_rank0(lambda: self.files.is_done(0)):
            # Outside the plan, because the curvature is a plan of its own, in which this process may be a worker.
            self.prepare()
        return run_plan(self, LaunchSettings.model_validate({}), None)
