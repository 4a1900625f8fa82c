"""Engines, which have pieces computed by other processes, and the loop of every process that computes them."""

import json
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from vestige.errors import UserError, memory_error
from vestige.jobs._pieces import Compute, Pieces
from vestige.jobs._record import Failure, JobFolder, make_failure_error
from vestige.jobs._steps import Meter, Stopped, check_stop, count_steps, stop_signal, stopping_at_steps
from vestige.jobs._worker import POLL_SECONDS, Role
from vestige.progress import Progress, announce, progress
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

    def bar(self) -> AbstractContextManager[Progress]:
        """Return a progress bar over the missing pieces."""
        total = round(sum(self.pieces.weights[piece] for piece in self.missing))
        return progress(total, self.pieces.name, self.pieces.unit)

    def write_shares(self, path: Path) -> str:
        """Write which pieces are missing, for `Role.shares`: what workers find missing changes with time."""
        make_folder(path.parent)
        write_durably(path, [json.dumps(list(self.missing)).encode()])
        return str(path.resolve())

    def is_over(self, piece: int) -> bool:
        """Return whether nothing more is to be done about a piece: it is done, or given up."""
        if self.pieces.is_done(piece):
            return True
        failure = self.job.failure(piece)
        return failure is not None and (failure.fatal or failure.attempts > self.settings.retries)


@final
class Worker(ExitStack):
    """One process's work on a job; a context, which closes what the pieces opened."""

    def __init__(self, work: Work, advance: Callable[[int], None] | None = None) -> None:
        """Make the worker of a process; it prints what it does unless `advance` moves a progress bar."""
        super().__init__()
        self._work, self._prints = work, advance is None
        self._meter = Meter(advance or (lambda _: None))
        self._compute: Compute | None = None
        self.last_error: Exception | None = None
        self.failed: dict[int, Failure] = {}
        """How pieces failed in this process; the disk may not have taken the note."""
        self.computed = 0
        """Pieces that this process finished."""
        self.stopped_in: int | None = None
        """The piece that was left when the process received a stop signal."""

    def compute(self, pieces: Sequence[int]) -> None:
        """Compute the pieces, those that failed again after the others, until each is done or given up.

        Raises:
            UserError: One that no retry can fix.
            Stopped: The process received a stop signal.
        """
        left = deque(pieces)
        while left:
            check_stop()
            piece = left.popleft()
            if self._work.pieces.is_done(piece):
                self._meter.piece(self._work.pieces.weights[piece])
                continue
            goes_on = self._attempts(piece) <= self._work.settings.retries and not self._work.is_over(piece)
            if goes_on and not self._try(piece):
                left.append(piece)
        # What the last piece leaves may still be on its way to the disk.
        self._compute = None
        try:
            self.close()
        except Exception as error:
            self._fail(pieces[-1], error)

    def _try(self, piece: int) -> bool:
        """Compute a piece once; note it if that fails, and return whether it did not."""
        weight, job = self._work.pieces.weights[piece], self._work.job
        self._print(f"piece {piece}: begun")
        job.note_begun(piece)
        try:
            if self._compute is None:
                started = time.perf_counter()
                self._compute = self.enter_context(self._work.pieces.open())
                job.note(-1, 0.0, time.perf_counter() - started)
            started = time.perf_counter()
            with count_steps(self._meter.step):
                self._compute(piece)
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
        job.note(piece, weight, seconds)
        job.forget_failures(piece)
        self._meter.piece(weight)
        self.computed += 1
        self._print(f"piece {piece}: done in {seconds:.1f} s")
        return True

    def _fail(self, piece: int, error: Exception) -> None:
        """Note how a piece failed, and raise what no retry can fix."""
        full = disk_error(error, self._work.pieces.folder) or memory_error(error)
        fatal = error if isinstance(error, UserError) else full
        noted = self._work.job.record_failure(piece, fatal or error)
        self.failed[piece] = noted._replace(attempts=max(noted.attempts, self._attempts(piece) + 1))
        self._leave()
        self._print(f"piece {piece}: failed\n{noted.traceback}")
        if fatal is not None:
            raise fatal from (None if fatal is error else error)
        self.last_error = error

    def _attempts(self, piece: int) -> int:
        return self.failed[piece].attempts if piece in self.failed else 0

    def _leave(self) -> None:
        self._meter.undo()
        self._work.job.note_begun(None)

    def _print(self, line: str) -> None:
        if self._prints:
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

    def cancel(self, job: JobFolder) -> list[str]:  # noqa: ARG002
        """End the workers of a job, which may be those of another command; return what was ended, for a person.

        Processes of this host are ended without the engine, and so are workers that end with one of them.

        Raises:
            UserError: The engine does not answer.
        """
        return []

    def status(self, job: JobFolder) -> bool:  # noqa: ARG002
        """Return whether workers of a job run, or wait to run, where only the engine can see them.

        Raises:
            UserError: The engine does not answer.
        """
        return False


ENGINES: Registry[Engine] = Registry("vestige.engines", "engine", Engine)


def watch_markers(work: Work, tick: Callable[[], bool], every: float = 0.0) -> None:
    """Show progress until every missing piece is done or given up, one fails for good, or `tick` returns False.

    `tick` is called at most once in `every` seconds.
    """
    left, among, ticked = list(work.missing), set(work.missing), -every
    with work.bar() as bar:
        while True:
            check_stop()
            began, goes_on = time.perf_counter(), True
            if began - ticked >= every:
                ticked, goes_on = began, tick()
            done = {piece for piece in left if work.pieces.is_done(piece)}
            for piece in done:
                bar.advance(round(work.pieces.weights[piece]))
            left = [piece for piece in left if piece not in done]
            is_fatal = any(failure.fatal and failure.piece in among for failure in work.job.failures())
            if not goes_on or is_fatal or all(map(work.is_over, left)):
                return
            # A thousand pieces on a slow disk must not keep the driver busy with reading markers.
            time.sleep(max(POLL_SECONDS, (time.perf_counter() - began) / _CHECK_SHARE))


@contextmanager
def ending_well(pieces: Pieces[Any]) -> Iterator[None]:
    """Let the block end between two batches, by SystemExit, after a stop signal, and print how to go on."""
    try:
        with stopping_at_steps():
            yield
    except (KeyboardInterrupt, Stopped) as error:
        announce(
            f"{pieces.name}: stopped with {len(pieces.missing())} of {pieces.count} pieces missing. "
            "Run the same command again: it computes only these."
        )
        if isinstance(error, Stopped):
            raise SystemExit(128 + (stop_signal() or 0)) from None
        raise


def raise_failures(work: Work, cause: BaseException | None = None, own: Mapping[int, Failure] = {}) -> None:
    """Raise UserError if some of the pieces failed for good.

    `cause` is the last error of this process, and `own` are its failures, which the disk may not have taken.
    """
    among, pieces = set(work.missing), work.pieces
    noted = {**own, **{each.piece: each for each in work.job.failures()}}
    failures = [noted[piece] for piece in sorted(noted) if piece in among and not pieces.is_done(piece)]
    if failures:
        raise make_failure_error(pieces.name, pieces.count, failures) from cause
