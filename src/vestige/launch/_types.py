"""A work plan: independent pieces that each leave one file with a marker, and a reduce.

Every heavy job is one. Every process that computes a piece, whenever and however often, leaves the same bytes; the
marker on disk is the only truth about what is done.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, TypeVar

Result_co = TypeVar("Result_co", covariant=True)

Compute = Callable[[int], None]
"""Computes one piece and leaves its file, then its marker (`vestige.storage.write_durably`).

It may call `vestige.launch.step_done(units)` after each batch: that moves the progress bar, and is where work stops
when the time limit is near or the machine is needed. Leaving the piece there must do no harm.
"""


class WorkPlan(Protocol[Result_co]):
    """Pieces 0 to `pieces - 1`, and what they are reduced to."""

    @property
    def name(self) -> str:
        """The name of the work, for a person: "Indexing", "Curvature", "Scoring"."""
        ...

    @property
    def unit(self) -> str:
        """The unit of `weight`, in the plural: "examples", "models"."""
        ...

    @property
    def folder(self) -> Path:
        """The folder of the result; claims, logs and the job's record live in `folder / "launch" / name`."""
        ...

    @property
    def pieces(self) -> int:
        """The number of pieces; never depends on who computes them."""
        ...

    def is_done(self, piece: int) -> bool:
        """Return whether the piece's marker is there and belongs to these settings; cheap."""
        ...

    def weight(self, piece: int) -> float:
        """Return the units of work in the piece, for rates and the time left: its examples, tokens, models or pairs."""
        ...

    def open(self) -> AbstractContextManager[Compute]:
        """Open what is needed to compute pieces (a loaded model, hooks), made once per worker."""
        ...

    def reduce(self) -> Result_co:
        """Return the result from all pieces, in piece order.

        Called by one process at a time, but possibly by several one after another: what is reduced already is found
        and returned.

        Raises:
            CorruptFile: pieces are missing, damaged or overlap; the message lists them.
        """
        ...
