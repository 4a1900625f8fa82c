"""Measurements as work plans: each piece leaves its tensors in a file, and all of them become one result."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, final

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vestige.launch import Compute, PieceFiles, phase, run_plan, step_done
from vestige.progress import progress
from vestige.settings import LaunchSettings
from vestige.storage import make_folder, write_durably

Tensors = dict[str, Tensor]


class Work(NamedTuple):
    """The launcher of passes over the data, as for `run_plan`."""

    settings: LaunchSettings
    command: Sequence[str] | None = None


HERE = Work(LaunchSettings.model_validate({}))


@final
@dataclass(frozen=True)
class PiecePlan:
    """A work plan whose pieces are tensors. Any process that computes a piece writes equal bytes."""

    name: str
    folder: Path
    files: PieceFiles
    weights: Sequence[int]
    """Units of work in each piece."""
    compute: Callable[[int, Callable[[int], None]], Tensors]
    """From a piece's number to its tensors; also takes the function to call with the units that are done."""
    combine: Callable[[Iterable[Tensors]], Tensors]
    """From the tensors of all pieces, in their order, to the result."""
    result: Path | None = None
    """File that the result is kept in: once it is there the pieces are removed. None: the pieces stay."""
    unit: str = "examples"

    @property
    def pieces(self) -> int:
        """Number of pieces."""
        return len(self.weights)

    def is_done(self, piece: int) -> bool:
        """Return whether the piece is there, or the result of all."""
        return self.files.is_done(piece) or (self.result is not None and self.result.exists())

    def weight(self, piece: int) -> float:
        """Return the piece's units."""
        return self.weights[piece]

    def open(self) -> AbstractContextManager[Compute]:
        """Return a context with what computes a piece: all it needs is loaded already."""
        return nullcontext(lambda piece: self.files.write(piece, self.compute(piece, step_done)))

    def reduce(self) -> Tensors:
        """Return the result; where it is kept in a file, write that and delete the pieces."""
        found = read_tensors(self.result) if self.result is not None else None
        if found is None:
            found = write_tensors(self.result, self.combine(map(self.files.read, range(self.pieces))))
        if self.result is not None:
            self.files.remove()
        return found

    def run(self, work: Work) -> Tensors:
        """Compute what is missing or was left damaged, and return the result."""
        if self.result is not None and read_tensors(self.result) is None:
            self.result.unlink(missing_ok=True)
        self.files.forget_damaged(range(self.pieces))
        with phase(self.name, self.unit) as done:
            done.extend(self.weights[piece] for piece in range(self.pieces) if not self.is_done(piece))
            return run_plan(self, work.settings, work.command)

    def run_in_memory(self) -> Tensors:
        """Return the result of all pieces; nothing but the result's file, if there is one, touches the disk."""
        with progress(sum(self.weights), self.name) as bar:
            found = self.combine(self.compute(piece, bar.advance) for piece in range(self.pieces))
        return write_tensors(self.result, found)


def add_pieces(parts: Iterable[Tensors]) -> Tensors:
    """Return the sum of the pieces, in their order."""
    total: Tensors = {}
    for part in parts:
        for name, tensor in part.items():
            total[name] = total[name].add_(tensor) if name in total else tensor
    return total


def read_tensors(path: Path) -> Tensors | None:
    """Return the tensors of a file, None if there is none or it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (FileNotFoundError, SafetensorError):
        return None


def write_tensors(path: Path | None, tensors: Tensors) -> Tensors:
    """Write the tensors, if there is a path; return them as a file holds them, so that a later run rounds alike."""
    kept = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
    if path is not None:
        make_folder(path.parent)
        write_durably(path, [save(kept)])
    return kept
