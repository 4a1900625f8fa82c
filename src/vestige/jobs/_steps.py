"""What work reports while it goes on: steps of a piece, which also end it after a stop signal, rates and profiles."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import final

from vestige.distributed import is_rank0
from vestige.jobs._worker import is_follower
from vestige.progress import announce, format_seconds, format_units
from vestige.storage import write_durably
from vestige.timing import Profile, profile_phases

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

    Call it after each batch. Outside `run_pieces` it does nothing.

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
    """Raise Stopped if the process received a stop signal."""
    if _STATE.received is None and _STATE.parent is not None and os.getppid() != _STATE.parent:
        _STATE.received = int(signal.SIGTERM)
    if _STATE.received is not None:
        raise Stopped(f"stopped by {signal.Signals(_STATE.received).name}")


def stop_signal() -> int | None:
    """Return the stop signal that this process received, None if there was none."""
    return _STATE.received


@contextmanager
def stopping_at_steps(parent: int | None = None) -> Iterator[None]:
    """Make a signal, or the end of process `parent`, not end this one but make the next `step_done` raise Stopped."""
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
def count_steps(count: Callable[[float], None]) -> Iterator[None]:
    """Make `step_done` report its units to `count` while the block runs."""
    before, _STATE.count = _STATE.count, count
    try:
        yield
    finally:
        _STATE.count = before


@final
class Meter:
    """Turns finished pieces and parts of pieces into units of a progress bar, each counted once."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance = advance
        self._finished, self._inside, self._shown = 0.0, 0.0, 0

    def step(self, units: float) -> None:
        """Count `units` of the current piece as done."""
        self._inside += units
        self._show()

    def piece(self, weight: float) -> None:
        """Count the current piece of this weight as done, whatever its steps reported."""
        self._finished += weight
        self.undo()
        self._show()

    def undo(self) -> None:
        """Take back the steps of a piece that was left; the bar does not go back, but waits for the piece."""
        self._inside = 0.0

    def _show(self) -> None:
        if (more := round(self._finished + self._inside) - self._shown) > 0:
            self._shown += more
            self._advance(more)


PROFILE_FILE = "profile.json"


@contextmanager
def phase(label: str, unit: str) -> Iterator[list[int]]:
    """Show the rate of a phase when the block ends without an error: what was appended to the list, per second.

    Units that were done before, by another process or a run that was killed, are not appended: a rate is that of the
    work done here.
    """
    started, done = time.perf_counter(), list[int]()
    yield done
    seconds, units = time.perf_counter() - started, sum(done)
    if units:
        rate = units / max(seconds, 1e-9)
        shown = f", {rate:,.0f} {unit}/s" if units > 1 and rate >= 1 else ""
        announce(f"{label}: {format_units(units, unit)} in {format_seconds(seconds)}{shown}")


@contextmanager
def profile(wanted: bool) -> Iterator[Profile | None]:
    """Measure the block if `wanted`, and show the table when it ends without an error."""
    with profile_phases(wanted) as measured:
        yield measured
    if measured is not None:
        announce(measured.table())


def write_profile(measured: Profile | None, folder: Path) -> None:
    """Write `profile.json` into the folder, if anything was measured; of several ranks, that of the first."""
    if measured is not None and is_rank0() and not is_follower():
        write_durably(folder / PROFILE_FILE, [(json.dumps(measured.record(), indent=1) + "\n").encode()])
