"""The engine of this machine: N processes, one per core or per GPU, which get one piece after another.

The driver and each worker talk over a pair of sockets, which is the worker's standard input: the worker sends a byte
whenever it is free, the driver answers with the number of a piece, and whichever sees the other end closed knows that
the other process is gone.
"""

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import final

from vestige.errors import PieceFailed
from vestige.jobs._command import worker_environment
from vestige.jobs._engine import Engine, Work, Worker, end_well
from vestige.jobs._record import JobFolder, tail
from vestige.jobs._role import POLL_SECONDS, Role
from vestige.jobs._steps import Meter, check_stop
from vestige.progress import announce, progress

_END_SECONDS = 10.0
"""How long a worker may take to reach the end of a batch before it is killed."""


@final
class LocalEngine(Engine):
    """Worker processes on this host. A worker that dies is replaced, and its replacement takes its GPU."""

    def submit(self, work: Work) -> "_ProcessPool":
        """Announce the workers; `wait` starts them, since they end with it."""
        count = min(work.settings.workers, len(work.missing))
        announce(f"{work.pieces.name}: {count} workers; their logs are in {work.job.logs}.")
        return _ProcessPool(work, count)

    def wait(self, work: Work, submitted: "_ProcessPool") -> None:
        """Give the pieces to the workers until none is left."""

        def watch() -> None:
            with progress(work.units(), work.pieces.name, work.pieces.unit) as bar:
                try:
                    submitted.watch(Meter(bar.advance))
                finally:
                    submitted.end()

        end_well(work.pieces, watch)

    def serve(self, work: Work, role: Role, worker: Worker) -> None:  # noqa: ARG002
        """Compute the pieces that the driver sends, until it sends no more."""
        with socket.socket(fileno=os.dup(0)) as driver, open(os.devnull) as nothing:
            # What a piece starts must not hold the connection when this process is gone.
            os.dup2(nothing.fileno(), 0)
            driver.settimeout(POLL_SECONDS)
            with contextlib.suppress(ConnectionError):
                driver.sendall(_FREE)
                for piece in _orders(driver):
                    if not work.is_over(piece):
                        worker.compute(piece)
                    driver.sendall(_FREE)

    def cancel(self, job: JobFolder) -> list[str]:  # noqa: ARG002
        """Return an empty list: workers end with their driver, a process of this host."""
        return []

    def status(self, job: JobFolder) -> bool:  # noqa: ARG002
        """Return False: the driver runs where workers do."""
        return False


_FREE = b"."


def _orders(driver: socket.socket) -> Iterator[int]:
    """Yield the numbers of pieces that the driver sends, a line each, until it closes the connection."""
    line = b""
    while True:
        check_stop()
        try:
            received = driver.recv(64)
        except TimeoutError:
            continue
        if not received:
            return
        *orders, line = (line + received).split(b"\n")
        yield from map(int, orders)


@dataclass
class _Running:
    """A worker process, with what it has in hand."""

    slot: int
    """Which of the workers it is, and so which GPU it has."""
    process: subprocess.Popen[bytes]
    log: Path
    channel: socket.socket
    is_free: bool = False
    piece: int | None = None
    attempts: int = 0
    """How often the piece had failed before."""


@final
class _ProcessPool:
    """The worker processes of one driver."""

    def __init__(self, work: Work, count: int) -> None:
        self._work, self._count = work, count
        self._left = deque(work.missing)
        self._running: list[_Running] = []
        self._started = self._early_deaths = 0
        self._selector = selectors.DefaultSelector()

    def watch(self, meter: Meter) -> None:
        """Have every piece done or given up.

        Raises:
            PieceFailed: Workers die before they begin a piece, again and again.
            DiskSpaceError: They do because the disk is full.
            Stopped: The process received a stop signal.
        """
        while not self._is_fatal():
            check_stop()
            self._give_pieces(meter)
            if not self._left and all(each.piece is None for each in self._running):
                return
            self._start_missing()
            for key, _ in self._selector.select(POLL_SECONDS):
                self._hear(key.data, meter)
            for each in [each for each in self._running if each.process.poll() is not None]:
                self._bury(each, meter)

    def end(self) -> None:
        """End all workers, the slow ones by force."""
        for each in self._running:
            with contextlib.suppress(ProcessLookupError):
                each.process.terminate()
        deadline = time.monotonic() + _END_SECONDS
        for each in self._running:
            try:
                each.process.wait(max(deadline - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                each.process.kill()
                each.process.wait()
            each.channel.close()
        self._running.clear()
        self._selector.close()

    def _is_fatal(self) -> bool:
        """Return whether a piece failed with an error that would end all others too, or that the user has to fix."""
        among = set(self._work.missing)
        return any(each.fatal and each.piece in among for each in self._work.job.failures())

    def _give_pieces(self, meter: Meter) -> None:
        """Give each free worker a piece that is not done, given up, or done by another command by now."""
        free = deque(each for each in self._running if each.is_free)
        while free and self._left:
            piece = self._left.popleft()
            if self._work.is_over(piece):
                self._count_done(piece, meter)
                continue
            each, failure = free.popleft(), self._work.job.failure(piece)
            each.is_free, each.piece, each.attempts = False, piece, failure.attempts if failure else 0
            # A worker that died by now is noticed when its end of the connection is read.
            with contextlib.suppress(ConnectionError):
                each.channel.sendall(b"%d\n" % piece)

    def _hear(self, each: _Running, meter: Meter) -> None:
        """Take note that a worker is free, or about to end."""
        try:
            received = each.channel.recv(64)
        except ConnectionError:
            received = b""
        if not received:
            self._selector.unregister(each.channel)
            return
        self._take_back(each, meter)
        each.is_free = True

    def _bury(self, dead: _Running, meter: Meter) -> None:
        """Forget a worker that has ended."""
        if dead.channel in self._selector.get_map():
            self._selector.unregister(dead.channel)
        dead.channel.close()
        self._running.remove(dead)
        if dead.piece is None:
            self._count_early_death(dead)
            return
        self._record_crash(dead)
        self._take_back(dead, meter)

    def _take_back(self, each: _Running, meter: Meter) -> None:
        """Have the piece that a worker had in hand tried again, if it is neither done nor given up."""
        piece, each.piece = each.piece, None
        if piece is None:
            return
        if self._work.is_over(piece):
            self._count_done(piece, meter)
        else:
            self._left.append(piece)

    def _count_done(self, piece: int, meter: Meter) -> None:
        if self._work.pieces.is_done(piece):
            self._early_deaths = 0
            meter.piece(self._work.pieces.weights[piece])

    def _record_crash(self, dead: _Running) -> None:
        """Count a death against the piece that the worker had in hand, for that may be what killed it."""
        assert dead.piece is not None
        failure, code = self._work.job.failure(dead.piece), dead.process.returncode
        if self._work.pieces.is_done(dead.piece) or (failure is not None and failure.attempts > dead.attempts):
            return
        if code > 0:
            # On a full disk a worker can neither note why it ended nor say it in its log.
            self._work.job.require_space()
        self._work.job.record_failure(dead.piece, f"its worker died ({_cause(code)})", log=str(dead.log))

    def _count_early_death(self, dead: _Running) -> None:
        code = dead.process.returncode
        self._work.job.require_space()
        self._early_deaths += 1
        if self._early_deaths > self._work.settings.retries + self._work.settings.workers:
            lines = "\n".join(f"    {line}" for line in tail(str(dead.log)))
            raise PieceFailed(
                f"{self._work.pieces.name}: workers end before they finish a piece ({_cause(code)}). "
                f"The log is {dead.log}:\n{lines}"
            )

    def _start_missing(self) -> None:
        """Start workers in the slots of those that died, as long as there are pieces for them."""
        taken = {each.slot for each in self._running}
        waiting = sum(each.piece is None for each in self._running)
        slots = [slot for slot in range(self._count) if slot not in taken]
        for slot in slots[: max(len(self._left) - waiting, 0)]:
            self._start(slot)

    def _start(self, slot: int) -> None:
        job, settings = self._work.job, self._work.settings
        log = job.logs / f"worker-{os.getpid()}-{self._started}.log"
        self._started += 1
        role = Role("worker", str(job.path.resolve()), slot, settings.workers, parent=os.getpid())
        channel, end = socket.socketpair()
        with log.open("ab") as file, end:
            process = subprocess.Popen(
                self._work.command,
                stdin=end.fileno(),
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | worker_environment(settings, log) | _device(slot) | role.as_environment(),
            )
        each = _Running(slot, process, log, channel)
        self._running.append(each)
        self._selector.register(channel, selectors.EVENT_READ, each)


def _device(slot: int) -> dict[str, str]:
    """Give every worker one GPU, round-robin, where there are any."""
    torch = sys.modules.get("torch")
    count = torch.cuda.device_count() if torch is not None else 0
    if not count:
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    return {"CUDA_VISIBLE_DEVICES": visible[slot % len(visible)]}


def _cause(code: int) -> str:
    if code >= 0:
        return f"exit status {code}"
    hint = ": often too little memory" if -code == signal.SIGKILL else ""
    return f"{signal.Signals(-code).name}{hint}"


LOCAL = LocalEngine()
