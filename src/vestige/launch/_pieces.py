"""A work plan: independent pieces that each leave one file with a marker, and a reduce.

Every heavy job is one. Every process that computes a piece, whenever and however often, leaves the same bytes; the
marker on disk is the only truth about what is done.
"""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

from vestige.distributed import broadcast_from_rank0, is_rank0
from vestige.errors import CorruptFile
from vestige.parsing import as_record, parse_object
from vestige.storage import make_folder, remove_durably, remove_strays, sha256_of, write_durably

if TYPE_CHECKING:
    from torch import Tensor


Result = TypeVar("Result")
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
        marker = self._marker(piece)
        if marker is None or not self.is_done(piece) or sha256_of(self.path(piece)) != marker.sha256:
            raise CorruptFile(f"{self.path(piece)} is missing or damaged. Run the same command again: it is redone.")

    def forget_damaged(self, pieces: Sequence[int]) -> list[int]:
        """Undo those of these pieces that are marked as done and whose bytes have changed; return their numbers.

        Reads every byte. Call it once before the work, so that a reduce finds nothing damaged after it.
        """
        return broadcast_from_rank0(lambda: self._forget_damaged(pieces))

    def _forget_damaged(self, pieces: Sequence[int]) -> list[int]:
        damaged = []
        for piece in pieces:
            marker = self._marker(piece)
            if marker is not None and self.is_done(piece) and sha256_of(self.path(piece)) != marker.sha256:
                remove_durably(self._marker_path(piece))
                damaged.append(piece)
        if self.folder.is_dir():
            remove_strays(self.folder)
        return damaged

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

    def _marker_path(self, piece: int) -> Path:
        return self.folder / f"{piece:05d}.json"

    def _marker(self, piece: int) -> PieceMarker | None:
        """Return the marker, None if there is none or it does not read."""
        try:
            return as_record(PieceMarker, parse_object(self._marker_path(piece).read_bytes()))
        except (OSError, ValueError):
            return None


SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name))
"""SIGTERM comes from `scancel` and preemption, SIGUSR1 shortly before the time limit, SIGUSR2 from some sites before
preemption."""


class Stopped(BaseException):
    """Work ends here because a signal requested it; like KeyboardInterrupt, no `except Exception` may hold it up."""


class _State:
    """What a piece that is being computed reports and must obey; one for the process, as signals are."""

    def __init__(self) -> None:
        self.depth = 0
        """How many `stopping_at_steps` are around: a piece may be a job of its own."""
        self.received: int | None = None
        self.count: Callable[[float], None] = lambda _: None
        self.parent: int | None = None
        self.kept = False


_STATE = _State()


def step_done(units: float = 0) -> None:
    """Note that `units` of the current piece's weight are done; work stops here after a stop signal.

    Call it after each batch. Outside `run_plan` it does nothing.

    Raises:
        Stopped: The process was sent SIGTERM, SIGUSR1 or SIGUSR2, or the process that started it is gone.
    """
    check_stop()
    _STATE.count(units)


def note_kept() -> None:
    """Note that what the current piece did so far is on disk: to leave it and begin it again is no loss of time."""
    _STATE.kept = True


def is_kept() -> bool:
    """Return whether a piece that was left has noted so."""
    return _STATE.kept


def check_stop() -> None:
    """Raise if the process received a stop signal.

    Raises:
        Stopped: It was.
    """
    if _STATE.received is None and _STATE.parent is not None and os.getppid() != _STATE.parent:
        _STATE.received = int(signal.SIGTERM)
    if _STATE.received is not None:
        raise Stopped(f"stopped by {signal.Signals(_STATE.received).name}")


def stop_signal() -> int | None:
    """Return the stop signal that this process received, None if there was none."""
    return _STATE.received


@contextmanager
def stopping_at_steps(parent: int | None = None) -> Iterator[None]:
    """Make a signal, while the block runs, not kill the process but make the next `step_done` raise `Stopped`.

    Args:
        parent: Process whose end also stops the work; None for none.
    """
    if threading.current_thread() is not threading.main_thread():
        # Only the main thread may set handlers; elsewhere a signal does what the program around us wants.
        yield
        return

    def receive(number: int, _: FrameType | None) -> None:
        _STATE.received = number

    before = {number: signal.signal(number, receive) for number in SIGNALS}
    around = _STATE.parent
    if _STATE.depth == 0:
        _STATE.received, _STATE.kept = None, False
    # A job inside a piece ends with whatever ends the job around it, and leaves the signal to that.
    _STATE.parent = around if parent is None else parent
    _STATE.depth += 1
    try:
        yield
    finally:
        _STATE.depth -= 1
        _STATE.parent = around
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def counting(count: Callable[[float], None]) -> Iterator[None]:
    """Make `step_done` report its units to `count` while the block runs."""
    before, _STATE.count = _STATE.count, count
    with contextlib.ExitStack() as stack:
        stack.callback(setattr, _STATE, "count", before)
        yield
