"""A work plan: independent pieces that each leave one file with a marker, and a reduce.

Every heavy job is one. Whoever computes a piece, whenever and however often, leaves the same bytes; the marker on disk
is the only truth about what is done.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, TypeVar

Result_co = TypeVar("Result_co", covariant=True)

Compute = Callable[[int], None]
"""Computes one piece and leaves its file, then its marker (`vestige.files.write_durably`).

It may call `vestige.launch.step_done(units)` after each batch: that moves the progress bar, and is where work stops
when the time limit is near or somebody wants the machine. Leaving the piece there must do no harm.
"""


class WorkPlan(Protocol[Result_co]):
    """Pieces 0 to `pieces - 1`, and what they are reduced to."""

    @property
    def name(self) -> str:
        """What is being done, for a person: "Indexing", "Curvature", "Scoring"."""
        ...

    @property
    def unit(self) -> str:
        """What `weight` counts, in the plural: "examples", "models"."""
        ...

    @property
    def folder(self) -> Path:
        """Where the result goes; claims, logs and the job's record live in `folder / "launch" / name`."""
        ...

    @property
    def pieces(self) -> int:
        """How many pieces there are; never depends on who computes them."""
        ...

    def is_done(self, piece: int) -> bool:
        """Whether the piece's marker is there and belongs to these settings; cheap."""
        ...

    def weight(self, piece: int) -> float:
        """Units of work in the piece, for rates and the time left: its examples, tokens, models or pairs."""
        ...

    def open(self) -> AbstractContextManager[Compute]:
        """What is needed to compute pieces (a loaded model, hooks), made once per worker."""
        ...

    def reduce(self) -> Result_co:
        """The result from all pieces, in piece order.

        Called by one process at a time, but perhaps by several one after another: what is reduced already is found
        and returned.

        Raises:
            CorruptFile: pieces are missing, damaged or overlap; the message lists them.
        """
        ...
