"""The engine of this machine: N processes, one per core or per GPU, each with its share of the pieces."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import final

from vestige.errors import PieceFailed
from vestige.jobs._command import worker_environment
from vestige.jobs._engine import Engine, Work, end_well, watch_markers
from vestige.jobs._record import JobFolder, tail
from vestige.jobs._role import Role
from vestige.progress import announce

_END_SECONDS = 10.0
"""How long a worker may take to reach the end of a batch before it is killed."""


@final
class LocalEngine(Engine):
    """Worker processes on this host. One that dies is replaced, and its replacement takes its share and its GPU."""

    def submit(self, work: Work) -> "_ProcessPool":
        """Announce the workers; `wait` starts them, since they end with it."""
        pool = _ProcessPool(work)
        announce(f"{work.pieces.name}: {pool.count} workers; their logs are in {work.job.logs}.")
        return pool

    def wait(self, work: Work, submitted: "_ProcessPool") -> None:
        """Run the workers until their shares are done."""

        def watch() -> None:
            try:
                submitted.start()
                watch_markers(work, submitted.replace_dead)
            finally:
                submitted.end()

        end_well(work.pieces, watch)

    def cancel(self, job: JobFolder) -> list[str]:  # noqa: ARG002
        """Return an empty list: workers end with their driver, a process of this host."""
        return []

    def status(self, job: JobFolder) -> bool:  # noqa: ARG002
        """Return False: processes of this host are seen without the engine."""
        return False


@final
class _ProcessPool:
    """The worker processes of one driver, by the number of their share."""

    def __init__(self, work: Work) -> None:
        self.count = min(work.settings.workers, len(work.missing))
        self._work = work
        self._running: dict[int, tuple[subprocess.Popen[bytes], Path]] = {}
        self._shares = ""
        self._started = self._early_deaths = 0

    def start(self) -> None:
        """Start a worker for each share."""
        self._shares = self._work.write_shares(self._work.job.path / "shares" / f"local-{os.getpid()}.json")
        for number in range(self.count):
            self._start(number)

    def replace_dead(self) -> bool:
        """Start again the workers that died, and return whether any is left.

        Raises:
            PieceFailed: Workers die before they begin a piece, again and again.
            DiskSpaceError: They do because the disk is full.
        """
        for number, (process, log) in list(self._running.items()):
            if process.poll() is None:
                continue
            del self._running[number]
            if process.returncode == 0:
                continue
            if not self._record_crash(process, log):
                self._count_early_death(process, log)
            if not all(map(self._work.is_over, self._work.missing[number :: self.count])):
                self._start(number)
        return bool(self._running)

    def end(self) -> None:
        """End all workers, the slow ones by force."""
        for process, _ in self._running.values():
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        deadline = time.monotonic() + _END_SECONDS
        for process, _ in self._running.values():
            try:
                process.wait(max(deadline - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._shares:
            Path(self._shares).unlink(missing_ok=True)

    def _record_crash(self, dead: "subprocess.Popen[bytes]", log: Path) -> bool:
        """Count a death against the piece that the worker had begun, for that may be what killed it."""
        journal = self._work.job.read_journal(dead.pid)
        piece = journal.at_work
        if piece is None:
            # A worker that ended with an error has noted it; the disk may have been too full for that.
            return bool(journal.entries) or (dead.returncode > 0 and bool(self._work.job.failures()))
        if not self._work.pieces.is_done(piece):
            self._work.job.record_failure(piece, f"its worker died ({_cause(dead.returncode)})", log=str(log))
        return True

    def _count_early_death(self, dead: "subprocess.Popen[bytes]", log: Path) -> None:
        # On a full disk a worker can neither note why it ended nor say it in its log.
        self._work.job.require_space()
        self._early_deaths += 1
        if self._early_deaths > self._work.settings.retries + self._work.settings.workers:
            lines = "\n".join(f"    {line}" for line in tail(str(log)))
            raise PieceFailed(
                f"{self._work.pieces.name}: workers end before they finish a piece ({_cause(dead.returncode)}). "
                f"The log is {log}:\n{lines}"
            )

    def _start(self, number: int) -> None:
        log = self._work.job.logs / f"worker-{os.getpid()}-{self._started}.log"
        self._started += 1
        home = str(self._work.job.path.resolve())
        role = Role("worker", home, number, self.count, parent=os.getpid(), shares=self._shares)
        environment = worker_environment(self._work.settings, log) | _device(number) | role.as_environment()
        with log.open("ab") as file:
            process = subprocess.Popen(
                self._work.command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | environment,
            )
        self._running[number] = process, log


def _device(number: int) -> dict[str, str]:
    """Give every worker one GPU, round-robin, where there are any."""
    torch = sys.modules.get("torch")
    count = torch.cuda.device_count() if torch is not None else 0
    if not count:
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    return {"CUDA_VISIBLE_DEVICES": visible[number % len(visible)]}


def _cause(code: int) -> str:
    if code >= 0:
        return f"exit status {code}"
    hint = ": often too little memory" if -code == signal.SIGKILL else ""
    return f"{signal.Signals(-code).name}{hint}"


LOCAL = LocalEngine()
