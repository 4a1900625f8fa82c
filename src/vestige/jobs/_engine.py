"""Engines, which have pieces computed by other processes, and the loop of every process that computes them."""

import json
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from vestige.errors import UserError
from vestige.jobs._pieces import Compute, Pieces
from vestige.jobs._record import Failure, JobFolder, make_failure_error
from vestige.jobs._role import POLL_SECONDS, Role
from vestige.jobs._steps import Meter, Stopped, check_stop, count_steps, stop_signal, stopping_at_steps
from vestige.progress import announce, progress
from vestige.registry import Registry
from vestige.settings import LaunchSettings
from vestige.storage import disk_error, make_folder, write_durably

_CHECK_SHARE = 0.05
"""Share of the time that may be spent reading markers."""


@dataclass(frozen=True)
class Work:
    """Pieces that are to be computed, as an engine gets them."""

    pieces: Pieces[Any]
    settings: LaunchSettings
    job: JobFolder
    """Where failures, logs and the record are kept."""
    missing: Sequence[int]
    """The pieces to compute."""
    command: Sequence[str] = ()
    """Words of a command that comes to the same pieces in another process."""

    def units(self) -> int:
        """Return the units of work in the missing pieces, for a progress bar."""
        return round(sum(self.pieces.weights[piece] for piece in self.missing))

    def write_shares(self, path: Path) -> str:
        """Write which pieces are missing, for `Role.shares`: what workers find missing changes with time."""
        make_folder(path.parent)
        write_durably(path, [json.dumps(list(self.missing)).encode()])
        return str(path.resolve())

    def is_over(self, piece: int) -> bool:
        """Return whether nothing more is to be done about a piece: it is done, or given up."""
        return self.pieces.is_done(piece) or self.job.is_given_up(piece, self.settings.retries)


@final
class Worker:
    """One process's work on a job; use it as a context, which closes what the pieces opened."""

    def __init__(self, work: Work, advance: Callable[[int], None] | None = None) -> None:
        """Make the worker of a process; it prints what it does unless `advance` moves a progress bar."""
        self.todo, self._log = work, advance is None
        self._meter = Meter(advance or (lambda _: None))
        self._stack = ExitStack()
        self._compute: Compute | None = None
        self.last_error: Exception | None = None
        self.failed: dict[int, Failure] = {}
        """How pieces failed in this process."""
        self.computed: list[int] = []
        """Pieces that this process finished."""
        self.stopped_in: int | None = None
        """The piece that was left when the process received a stop signal."""

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def work(self, pieces: Sequence[int]) -> None:
        """Compute the pieces, those that failed again after the others, until each is done or given up.

        Raises:
            UserError: One that no retry can fix.
            Stopped: The process received a stop signal.
        """
        left, done = deque(pieces), self.todo.pieces.is_done
        while left:
            check_stop()
            piece = left.popleft()
            if done(piece):
                self._meter.piece(self.todo.pieces.weights[piece])
            elif not self._is_given_up(piece) and not self.compute(piece):
                left.append(piece)
        # What the last piece leaves may still be on its way to the disk.
        self._compute = None
        try:
            self._stack.close()
        except Exception as error:
            self._fail(pieces[-1], error)

    def _is_given_up(self, piece: int) -> bool:
        """Return whether the piece was tried often enough; the disk may not have taken what failed here."""
        tried = self.failed[piece].attempts if piece in self.failed else 0
        return tried > self.todo.settings.retries or self.todo.is_over(piece)

    def compute(self, piece: int) -> bool:
        """Compute a piece once; note it if that fails, and return whether it did not.

        Raises:
            UserError: One that no retry can fix.
            Stopped: The process received a stop signal.
        """
        pieces, job = self.todo.pieces, self.todo.job
        self._print(f"piece {piece}: begun")
        job.note_begun(piece)
        try:
            compute = self._open()
            started = time.perf_counter()
            with count_steps(self._meter.step):
                compute(piece)
        except Exception as error:
            self._fail(piece, error)
            return False
        except BaseException as error:
            self._leave()
            if isinstance(error, Stopped):
                self.stopped_in = piece
                self._print(f"piece {piece}: left, because the process received a stop signal")
            raise
        seconds = time.perf_counter() - started
        job.note(piece, pieces.weights[piece], seconds)
        job.forget_failure(piece)
        self._meter.piece(pieces.weights[piece])
        self.computed.append(piece)
        self._print(f"piece {piece}: done in {seconds:.1f} s")
        return True

    def _leave(self) -> None:
        self._meter.undo()
        self.todo.job.note_begun(None)

    def _fail(self, piece: int, error: Exception) -> None:
        """Note the failure; raise if it would end every other attempt too."""
        full = None if isinstance(error, UserError) else disk_error(error, self.todo.pieces.folder)
        noted = self.todo.job.record_failure(piece, full or error)
        self._leave()
        before = self.failed[piece].attempts if piece in self.failed else 0
        # The disk may not have taken the note.
        self.failed[piece] = noted._replace(attempts=max(noted.attempts, before + 1))
        if full is not None:
            raise full from error
        if isinstance(error, UserError):
            raise error
        self.last_error = error
        self._print(f"piece {piece}: failed\n{noted.traceback}")

    def _open(self) -> Compute:
        if self._compute is None:
            started = time.perf_counter()
            self._compute = self._stack.enter_context(self.todo.pieces.open())
            self.todo.job.note(-1, 0.0, time.perf_counter() - started)
        return self._compute

    def _print(self, line: str) -> None:
        if self._log:
            print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


class Engine(ABC):
    """Runs a command of Vestige as several workers, each of which computes its share when it comes to the pieces.

    An engine decides nothing about the work: a piece is done when its marker is there, and a worker may die, come twice
    or never. It is registered as an entry point of `vestige.engines`, under the name that `--engine` takes.
    """

    @abstractmethod
    def submit(self, work: Work) -> Any:
        """Start workers for the missing pieces, and return what `wait` needs to know of them.

        Raises:
            UserError: The engine refuses.
        """

    @abstractmethod
    def wait(self, work: Work, submitted: Any) -> None:
        """Return when every missing piece is done or given up; show progress, start again what died.

        Raises:
            WorkElsewhere: The settings say not to wait.
            PieceFailed: Workers end without doing their pieces, again and again.
            SystemExit: The process received a stop signal.
        """

    def follow_up(self, work: Work, role: Role) -> None:  # noqa: B027
        """Start the next attempt at what is missing, in a process of the role `reduce`.

        Raises:
            SystemExit: Others go on: the next workers, or the process that waits for them.
        """

    def restart(self, job: JobFolder, worker: Worker) -> None:  # noqa: B027
        """Have this worker started again, which received a stop signal and ends."""

    @abstractmethod
    def cancel(self, job: JobFolder) -> list[str]:
        """End the workers of a job, which may be those of another command; return what was ended, for a person.

        Processes of this host are ended without the engine.

        Raises:
            UserError: The engine does not answer.
        """

    @abstractmethod
    def status(self, job: JobFolder) -> bool:
        """Return whether workers of a job run, or wait to run, where only the engine can see them.

        Raises:
            UserError: The engine does not answer.
        """


ENGINES: Registry[Engine] = Registry("vestige.engines", "engine", Engine)


def watch_markers(work: Work, tick: Callable[[], bool], pause: float = POLL_SECONDS) -> None:
    """Show progress until every missing piece is done or given up, one fails for good, or `tick` returns False."""
    left, among = list(work.missing), set(work.missing)
    with progress(work.units(), work.pieces.name, work.pieces.unit) as bar:
        while True:
            check_stop()
            goes_on, began = tick(), time.perf_counter()
            done = {piece for piece in left if work.pieces.is_done(piece)}
            for piece in done:
                bar.advance(round(work.pieces.weights[piece]))
            left = [piece for piece in left if piece not in done]
            is_fatal = any(failure.fatal and failure.piece in among for failure in work.job.failures())
            if not goes_on or is_fatal or all(map(work.is_over, left)):
                return
            # A thousand pieces on a slow disk must not keep the driver busy with reading markers.
            time.sleep(max(pause, (time.perf_counter() - began) / _CHECK_SHARE))


def end_well(pieces: Pieces[Any], work: Callable[[], None]) -> None:
    """Do `work`; if it is stopped, print how to go on.

    Raises:
        SystemExit: The process received a stop signal.
    """
    try:
        with stopping_at_steps():
            work()
    except (KeyboardInterrupt, Stopped) as error:
        announce(
            f"{pieces.name}: stopped with {len(pieces.missing())} of {pieces.count} pieces missing. "
            "Run the same command again: it computes only these."
        )
        if isinstance(error, Stopped):
            raise SystemExit(128 + (stop_signal() or 0)) from None
        raise


def raise_failures(work: Work, cause: BaseException | None = None, own: Mapping[int, Failure] = {}) -> None:
    """Raise if some of the pieces failed for good.

    Args:
        work: What was to be done.
        cause: The last error of this process.
        own: Failures in this process, which the disk may not have taken.

    Raises:
        UserError: They did.
    """
    among, pieces = set(work.missing), work.pieces
    noted = {**own, **{each.piece: each for each in work.job.failures()}}
    failures = [noted[piece] for piece in sorted(noted) if piece in among and not pieces.is_done(piece)]
    if failures:
        raise make_failure_error(pieces.name, pieces.count, failures) from cause
