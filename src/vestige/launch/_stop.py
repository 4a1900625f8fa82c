"""Stopping at a good moment: after a signal, work ends between two batches with everything given back."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

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
        self.asked: int | None = None
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
    if _STATE.asked is None and _STATE.parent is not None and os.getppid() != _STATE.parent:
        _STATE.asked = int(signal.SIGTERM)
    if _STATE.asked is not None:
        raise Stopped(f"stopped by {signal.Signals(_STATE.asked).name}")


def stop_signal() -> int | None:
    """Return the stop signal that this process received, None if there was none."""
    return _STATE.asked


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

    def ask(number: int, _: FrameType | None) -> None:
        _STATE.asked = number

    before = {number: signal.signal(number, ask) for number in SIGNALS}
    around = _STATE.parent
    if _STATE.depth == 0:
        _STATE.asked, _STATE.kept = None, False
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
