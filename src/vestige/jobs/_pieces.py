"""Independent pieces of work that each leave a file with a marker, and what they are reduced to.

Every heavy job is one. Every process that computes a piece, whenever and however often, leaves the same bytes; the
marker on disk is the only truth about what is done.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from vestige.distributed import broadcast_from_rank0, is_rank0
from vestige.errors import CorruptFile
from vestige.parsing import read_record
from vestige.storage import make_folder, remove_durably, remove_strays, sha256_of, write_durably

if TYPE_CHECKING:
    from torch import Tensor

Item = TypeVar("Item")
Result = TypeVar("Result")

Compute = Callable[[int], None]
"""Computes one piece and leaves its file, then its marker (`vestige.storage.write_durably`).

It may call `vestige.jobs.step_done(units)` after each batch: that moves the progress bar, and is where work stops
when the time limit is near or the machine is needed. Leaving the piece there must do no harm.
"""


@dataclass(frozen=True, kw_only=True)
class Pieces(Generic[Result]):
    """Pieces 0 to `count - 1` of a job, and what they are reduced to; `run_pieces` has them computed.

    Made where the work is defined: the process that a person started and each of its workers make the same object.
    """

    name: str
    """The name of the work, for a person: "Indexing", "Curvature", "Scoring"."""
    unit: str = "examples"
    """The unit of `weights`, in the plural: "examples", "models"."""
    folder: Path
    """The folder of the result; logs and the job's record lie in `folder / "launch" / name`."""
    weights: Sequence[float]
    """Units of work in each piece, for rates and the time left; their number never depends on who computes them."""
    is_done: Callable[[int], bool]
    """Returns whether the piece's marker is there and belongs to these settings; cheap."""
    open: Callable[[], AbstractContextManager[Compute]]
    """Opens what is needed to compute pieces (a loaded model, hooks), once per worker."""
    for_all: bool = False
    """Whether every share of the work (`--shard`) needs all pieces for what it does next: it computes its own first,
    and then what no other share has done by then."""
    reduce: Callable[[], Result]
    """Returns the result from all pieces, in their order.

    Called by one process at a time, but possibly by several one after another: what is reduced already is found and
    returned. Raises CorruptFile if pieces are missing, damaged or overlap; the message lists them.
    """

    @property
    def count(self) -> int:
        """The number of pieces."""
        return len(self.weights)

    def missing(self) -> list[int]:
        """Return the pieces that are not done, in order."""
        return [piece for piece in range(self.count) if not self.is_done(piece)]

    def share(self, part: int, parts: int) -> list[int]:
        """Return the pieces of one share of the work, in the order in which it does them."""
        own = list(range(part, self.count, parts))
        return [*own, *(piece for piece in range(self.count) if piece % parts != part)] if self.for_all else own


Tensors = dict[str, "Tensor"]


def group_items(items: Iterable[Item], weigh: Callable[[Item], int], limit: int) -> list[list[Item]]:
    """Return consecutive items in groups, a piece of work each, whose weights add up to `limit`, or a little more."""
    groups, total = list[list[Item]]([[]]), 0
    for item in items:
        if total >= limit:
            groups.append([])
            total = 0
        groups[-1].append(item)
        total += weigh(item)
    return groups


class PieceMarker(NamedTuple):
    """What `00012.json` says about `00012.safetensors`."""

    piece: int
    bytes: int
    sha256: str
    input: str
    """Fingerprint of everything that decides the piece's content."""


@dataclass(frozen=True)
class PieceFiles:
    """Numbered pieces of tensors in a folder, all made from the same `input`."""

    folder: Path
    input: str
    """Fingerprint of settings, inputs and code: a piece with another one does not count as done."""

    def is_done(self, piece: int) -> bool:
        """Return whether the piece is marked as done for this input and its file has the right size; read no tensor."""
        marker = self._marker(piece)
        if marker is None or marker.input != self.input:
            return False
        try:
            return self.path(piece).stat().st_size == marker.bytes
        except FileNotFoundError:
            return False

    def write(self, piece: int, tensors: "dict[str, Tensor]") -> None:
        """Write the piece to disk, whole, and then mark it so; in a process group the first process writes it."""
        if not is_rank0():
            return
        # Torch is imported where it is needed: `vestige status` and a driver that only waits do without.
        from safetensors.torch import save

        make_folder(self.folder)
        # A marker of an earlier file must not vouch for the new one while that is being written.
        if self._marker_path(piece).exists():
            remove_durably(self._marker_path(piece))
        content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        written = write_durably(self.path(piece), [save(content)])
        marker = PieceMarker(piece, written.bytes, written.sha256, self.input)
        write_durably(self._marker_path(piece), [(json.dumps(marker._asdict(), indent=1) + "\n").encode()])

    def read(self, piece: int) -> "dict[str, Tensor]":
        """Read the tensors of a piece.

        Raises:
            CorruptFile: it is missing, of another input, or its bytes are not those in its marker.
        """
        from safetensors.torch import load

        self.check(piece)
        return load(self.path(piece).read_bytes())

    def check(self, piece: int) -> None:
        """Raise unless the piece is done and every byte of it is what was written.

        Raises:
            CorruptFile: it is not.
        """
        if not self.is_done(piece) or not self._is_whole(piece):
            raise CorruptFile(f"{self.path(piece)} is missing or damaged. Run the same command again: it is redone.")

    def forget_damaged(self, pieces: Sequence[int]) -> list[int]:
        """Undo those of these pieces that are marked as done and whose bytes have changed; return their numbers.

        Reads every byte. Call it once before the work, so that a reduce finds nothing damaged after it.
        """

        def forget() -> list[int]:
            damaged = [piece for piece in pieces if self.is_done(piece) and not self._is_whole(piece)]
            for piece in damaged:
                remove_durably(self._marker_path(piece))
            if self.folder.is_dir():
                remove_strays(self.folder)
            return damaged

        return broadcast_from_rank0(forget)

    def fingerprint(self, pieces: Sequence[int]) -> str:
        """Return the sha256 over the contents of these pieces, from their markers."""
        markers = [self._marker(piece) for piece in pieces]
        return hashlib.sha256(json.dumps([marker and marker.sha256 for marker in markers]).encode()).hexdigest()

    def remove(self) -> None:
        """Remove the folder with all that is in it; two processes that remove it at once do no harm."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def path(self, piece: int) -> Path:
        """Return the path of a piece's tensors."""
        return self.folder / f"{piece:05d}.safetensors"

    def _is_whole(self, piece: int) -> bool:
        marker = self._marker(piece)
        return marker is not None and sha256_of(self.path(piece)) == marker.sha256

    def _marker_path(self, piece: int) -> Path:
        return self.folder / f"{piece:05d}.json"

    def _marker(self, piece: int) -> PieceMarker | None:
        return read_record(PieceMarker, self._marker_path(piece))


def tensor_pieces(
    name: str,
    files: PieceFiles,
    weights: Sequence[float],
    open: Callable[[], AbstractContextManager[Callable[[int], Tensors]]],
    collect: Callable[[Iterator[Tensors]], Result],
    *,
    unit: str = "examples",
    folder: Path | None = None,
    numbers: range | None = None,
) -> Pieces[Result]:
    """Return work whose pieces are files of tensors.

    Args:
        name: As of `Pieces`.
        files: Where the pieces lie, and the fingerprint of everything that decides them.
        weights: Units of work in each piece.
        open: Opens what the pieces need, and yields the function from a file's number to its tensors.
        collect: Makes the result from the pieces, in their order.
        unit: Of the weights.
        folder: Of the result; not given: the one that the files' folder lies in.
        numbers: Of the files, one for each piece; not given: from 0.
    """
    numbers = range(len(weights)) if numbers is None else numbers

    @contextmanager
    def open_files() -> Iterator[Compute]:
        with open() as compute:
            yield lambda piece: files.write(numbers[piece], compute(numbers[piece]))

    return Pieces(
        name=name,
        unit=unit,
        folder=folder or files.folder.parent,
        weights=weights,
        is_done=lambda piece: files.is_done(numbers[piece]),
        open=open_files,
        reduce=lambda: collect(map(files.read, numbers)),
    )


def cut_ranges(sizes: Sequence[int], most: int) -> list[range]:
    """Return ranges of consecutive numbers whose sizes add up to at most `most`, or of one that alone is larger."""
    borders, total = [0], 0
    for number, size in enumerate(sizes):
        if total and total + size > most:
            borders.append(number)
            total = 0
        total += size
    return [range(first, last) for first, last in pairwise([*borders, len(sizes)]) if first < last]
