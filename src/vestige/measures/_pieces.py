"""Work of an audit in pieces: what decides them, where they are until the run is written, and how they are run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from vestige.launch import Compute, PieceFiles, phase, run_plan, step_done, worker_command
from vestige.measures._job import AuditJob
from vestige.settings import LaunchSettings
from vestige.storage import partial_folder

if TYPE_CHECKING:
    from torch import Tensor

Tensors: TypeAlias = "dict[str, Tensor]"
Item = TypeVar("Item")

FORMAT = 2
"""Raised when a piece of the same settings changes its meaning."""
_OF_THE_OUTPUT = frozenset(
    [
        "out",
        "overwrite",
        "bank",
        "bank_subset",
        "bank_value",
        "flag",
        "memorized_at",
        "choose_layer",
        "measures",
        "canaries",
        "canary_references",
    ]
)
"""Settings that decide no pass through a model."""


def piece_files(job: AuditJob, name: str, more: Any) -> PieceFiles:
    """Return the files of one kind of pieces, which count as done if everything that decides them is the same."""
    ignored = _OF_THE_OUTPUT | set(LaunchSettings.model_fields)
    recorded = {name: value for name, value in job.settings.record().items() if name not in ignored}
    models = {"pass", "generation", "states"}
    measured = [each.name for each in job.measures if each.stage in models or "reference model" in each.needs]
    choices = job.choices.position.tobytes() + job.choices.tokens.tobytes() + job.classes.tobytes()
    parts = (
        FORMAT,
        version("vestige"),
        recorded,
        measured,
        [each.fingerprint for each in job.subjects],
        job.reference_fingerprint,
        job.data.fingerprint,
        hashlib.sha256(choices).hexdigest(),
        job.layers,
        more,
    )
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
    return PieceFiles(partial_folder(job.settings.out) / name, digest)


def group(items: Iterable[Item], weigh: Callable[[Item], int], limit: int) -> list[list[Item]]:
    """Return the items in groups whose weights add up to `limit`, or a little more."""
    groups, total = list[list[Item]]([[]]), 0
    for item in items:
        if total >= limit:
            groups.append([])
            total = 0
        groups[-1].append(item)
        total += weigh(item)
    return groups


@dataclass(frozen=True)
class AuditPieces:
    """Work that leaves one file of tensors for each piece, as `run_plan` takes it."""

    job: AuditJob
    name: str
    unit: str
    files: PieceFiles
    numbers: range
    """Of the files, one for each piece."""
    compute: Callable[[int], Tensors]
    """From the number of a file to its content."""
    count: Callable[[int], int] | None = None
    """Units of work behind a file, which `compute` reports as it does them; None: one, when the file is written."""
    is_complete: Callable[[int], bool] = lambda number: True  # noqa: ARG005
    """Whether what belongs to a file that is there is there too."""

    @property
    def folder(self) -> Path:
        """Beside the run, until that is written."""
        return partial_folder(self.job.settings.out)

    @property
    def pieces(self) -> int:
        """The number of files."""
        return len(self.numbers)

    def is_done(self, piece: int) -> bool:
        """Return whether the piece's file is there, with what belongs to it."""
        return self.files.is_done(self.numbers[piece]) and self.is_complete(self.numbers[piece])

    def weight(self, piece: int) -> float:
        """Return the piece's units of work."""
        return 1 if self.count is None else self.count(self.numbers[piece])

    @contextmanager
    def open(self) -> Iterator[Compute]:
        """Yield the function that computes one piece."""

        def compute(piece: int) -> None:
            self.files.write(self.numbers[piece], self.compute(self.numbers[piece]))
            if self.count is None:
                step_done(1)

        yield compute

    def reduce(self) -> list[Tensors]:
        """Return the content of every file, in order.

        Raises:
            CorruptFile: A piece is missing or damaged.
        """
        return [self.files.read(number) for number in self.numbers]

    def run(self) -> list[Tensors]:
        """Run the work where the settings choose and return the content of every file; a killed call continues."""
        self.files.forget_damaged(self.numbers)
        settings = self.job.settings
        with phase(self.name, self.unit) as done:
            done.extend(round(self.weight(piece)) for piece in range(self.pieces) if not self.is_done(piece))
            return run_plan(self, settings, worker_command(settings, "audit"))
