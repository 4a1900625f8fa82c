"""The engine of this machine, N processes, and what it shares with engines whose workers end with the command, too."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any, Protocol, final

from vestige.errors import PieceFailed
from vestige.jobs._engine import Engine, Work, ending_well, watch_markers
from vestige.jobs._record import tail
from vestige.jobs._worker import CARDS, Role, choose_card, start_worker, worker_environment
from vestige.progress import announce

_END_SECONDS = 10.0
"""How long a worker may take to reach the end of a batch before it is killed."""
_DISK_SECONDS = 60.0
"""How long a marker that another host wrote may take to be seen here: NFS keeps what it knows of a folder."""


class Process(Protocol):
    """A worker process, as `subprocess.Popen` is one."""

    def poll(self) -> int | str | None:
        """Return its exit status, what became of it where there is none, or None while it runs or waits to run."""

    def terminate(self) -> None:
        """Request its end after its batch."""

    def wait(self, timeout: float) -> Any:
        """Wait for its end; raise `subprocess.TimeoutExpired` unless it comes in this many seconds."""

    def kill(self) -> None:
        """End it at once, and free its place; one that has ended is no error."""


Start = Callable[[int, Role, Path], Process]
"""Starts the worker of this number in this role, which prints into this log."""


class PoolEngine(Engine):
    """Keeps a worker process for each share; one that dies is replaced, and its replacement takes its share."""

    @abstractmethod
    def connect(self, work: Work) -> AbstractContextManager[Start]:
        """Yield the function that starts a worker.

        Raises:
            UserError: The engine cannot be reached.
        """

    def submit(self, work: Work) -> None:
        """Leave it to `wait` to start the workers, since they end with it."""

    def wait(self, work: Work, submitted: None) -> None:  # noqa: ARG002
        """Run the workers until their shares are done."""
        with ending_well(work.pieces), self.connect(work) as start, closing(_Pool(work, start)) as pool:
            watch_markers(work, pool.replace_dead)


@final
class _Pool:
    """The worker processes of one driver, by the number of their share."""

    def __init__(self, work: Work, start: Start) -> None:
        self._work, self._start_worker = work, start
        self._count = min(work.settings.workers, len(work.missing))
        self._shares = work.write_shares(work.job.path / "shares" / f"{work.settings.engine}-{os.getpid()}.json")
        self._running: dict[int, tuple[Process, Path]] = {}
        self._started = self._early_deaths = 0
        self._last_end = time.monotonic()
        announce(f"{work.pieces.name}: {self._count} workers; their logs are in {work.job.logs}.")

    def replace_dead(self) -> bool:
        """Start every worker, again if it died; return False when all have ended.

        Raises:
            PieceFailed: Workers die before they begin a piece, again and again.
            DiskSpaceError: They do because the disk is full.
        """
        for number in range(self._count if not self._started else 0):
            self._start(number)
        for number, (process, log) in list(self._running.items()):
            status = process.poll()
            if status is None:
                continue
            process.kill()
            del self._running[number]
            self._last_end = time.monotonic()
            if status == 0:
                continue
            if not self._record_crash(status, log):
                self._count_early_death(status, log)
            if not all(map(self._work.is_over, self._work.missing[number :: self._count])):
                self._start(number)
        return bool(self._running) or time.monotonic() - self._last_end < _DISK_SECONDS

    def close(self) -> None:
        """End all workers, the slow ones by force."""
        for process, _ in self._running.values():
            process.terminate()
        deadline = time.monotonic() + _END_SECONDS
        for process, _ in self._running.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(deadline - time.monotonic(), 0.1))
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_END_SECONDS)
        Path(self._shares).unlink(missing_ok=True)

    def _start(self, number: int) -> None:
        log = self._work.job.logs / f"worker-{os.getpid()}-{self._started}.log"
        self._started += 1
        home = str(self._work.job.path.resolve())
        role = Role("worker", home, number, self._count, parent=os.getpid(), shares=self._shares)
        self._running[number] = self._start_worker(number, role, log), log

    def _record_crash(self, status: int | str, log: Path) -> bool:
        """Count a death against the piece that the worker had begun, for that may be what killed it."""
        job, journal = self._work.job, self._work.job.read_journal(log.stem)
        piece = journal.at_work
        if piece is None:
            # A worker that ended with an error has noted it; the disk may have been too full for that.
            is_error = isinstance(status, int) and status > 0
            return bool(journal.entries) or (is_error and bool(job.failures()))
        if not self._work.pieces.is_done(piece):
            job.record_failure(piece, f"its worker died ({_cause(status)})", log=str(log))
        return True

    def _count_early_death(self, status: int | str, log: Path) -> None:
        # On a full disk a worker can neither note why it ended nor say it in its log.
        self._work.job.write_job()
        self._early_deaths += 1
        if self._early_deaths > self._work.settings.retries + self._work.settings.workers:
            lines = "\n".join(f"    {line}" for line in tail(str(log)))
            raise PieceFailed(
                f"{self._work.pieces.name}: workers end before they finish a piece ({_cause(status)}). "
                f"The log is {log}:\n{lines}"
            )


def _cause(status: int | str) -> str:
    if isinstance(status, str):
        return status
    if status >= 0:
        return f"exit status {status}"
    hint = ": often too little memory" if -status == signal.SIGKILL else ""
    return f"{signal.Signals(-status).name}{hint}"


@final
class LocalEngine(PoolEngine):
    """Worker processes on this host. One that dies is replaced, and its replacement takes its share and its GPU."""

    @contextmanager
    def connect(self, work: Work) -> Iterator[Start]:
        """Yield the function that starts a process."""

        def start(number: int, role: Role, log: Path) -> "subprocess.Popen[bytes]":
            environment = worker_environment(work.settings, log) | _device(number) | role.as_environment()
            return start_worker(work.command, environment, log)

        yield start


def _device(number: int) -> dict[str, str]:
    """Give every worker one GPU, round-robin, where there are any."""
    torch = sys.modules.get("torch")
    count = torch.cuda.device_count() if torch is not None else 0
    return {CARDS: choose_card(number, count)} if count else {}


LOCAL = LocalEngine()
