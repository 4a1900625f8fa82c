"""Who works on which piece: a file for each claim, made exclusively, kept warm, taken over when its owner died.

Claims only save work. Should two processes ever compute the same piece, both write the same bytes under names of their
own, and the marker is right whichever was last.
"""

import contextlib
import json
import math
import os
import secrets
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, final

import psutil
from pydantic import FiniteFloat, PositiveInt, TypeAdapter

from vestige.distributed import ROLE_VARIABLE
from vestige.errors import SpecError
from vestige.storage import find_result_folder, is_held_by, this_host, write_durably


class Worker(NamedTuple):
    """A process as another one can find it, also after process numbers were given out again."""

    host: str
    """Host and process namespace: containers count their processes themselves."""
    pid: PositiveInt
    born: FiniteFloat
    """When the process started, in seconds since its host did: setting the host's clock does not move it."""
    job: str
    """Id of its batch job, empty outside a scheduler."""
    token: str
    """Its own, so that a claim can be known again."""


_LONGEST_PATH = 4096
_TOKEN = secrets.token_hex(4)


WORKER = TypeAdapter(Worker)
"""Validates what a file holds about a process."""


def this_worker() -> Worker:
    """Return the identity of this process."""
    pid = os.getpid()
    return Worker(this_host(), pid, start_time(psutil.Process(pid)), job_id(), f"{_TOKEN}-{pid}")


def job_id() -> str:
    """Return the batch job that this process belongs to, as `squeue` writes it: 17 or 17_3."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")


def start_time(process: psutil.Process) -> float:
    """Return when a process started, in seconds since its host did, or since 1970 where that is not known."""
    try:
        # The name of the program, in parentheses, may hold blanks; the start is the 22nd field, in ticks.
        fields = Path(f"/proc/{process.pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
        return int(fields.split()[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, ValueError):  # not Linux, or gone by now
        return process.create_time()


def works_on(worker: Worker, job: Path) -> bool:
    """Return whether the process is one of ours, of this user, that works on the job folder.

    A file names it, which any user may have written; what the process is, only the system knows.
    """
    try:
        process = psutil.Process(worker.pid)
        if process.uids().real != os.getuid():
            return False
        role = process.environ().get(ROLE_VARIABLE)
        if role is not None and json.loads(role).get("job") == str(job.resolve()):
            return True
        result = find_result_folder(job.resolve().parent.parent)
        if any(is_held_by(folder, worker.pid) for folder in (result, *result.parents[:-1])):
            return True
        words, place = process.cmdline(), Path(process.cwd())
        is_ours = any(Path(word).name == "vestige" for word in words[:2]) or "vestige.cli" in words[:4]
        named = ((place / word.split("=", 1)[-1]).resolve() for word in words[1:] if len(word) < _LONGEST_PATH)
        return is_ours and result in named
    except (psutil.Error, OSError, ValueError, AttributeError):
        return False


def is_alive(worker: Worker) -> bool | None:
    """Return whether the process lives; None if it ran on another host, where this one cannot check."""
    if worker.host != this_host():
        return None
    try:
        process = psutil.Process(worker.pid)
        return start_time(process) == worker.born and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


_STALE_VARIABLE, _STALE_SECONDS = "VESTIGE_STALE_SECONDS", 60.0
_BEATS = 12
"""Heartbeats in the time after which a claim is stale."""


def stale_seconds() -> float:
    """Return how long a claim from another host may go untouched until it is free: VESTIGE_STALE_SECONDS for all.

    Longer than any pause of a living process's heartbeat thread, including a network disk that is slow to show it.

    Raises:
        SpecError: The variable is not a number of seconds.
    """
    given = os.environ.get(_STALE_VARIABLE, str(_STALE_SECONDS))
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise SpecError(f"{_STALE_VARIABLE} was {given!r}, expected a number of seconds, such as {_STALE_SECONDS:g}.")
    return seconds


class Owner(NamedTuple):
    """Who holds a claim, and since when (seconds since 1970, by its own clock)."""

    worker: Worker
    since: float


@final
class Claims:
    """The claims in one folder, from the view of one process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stale_seconds = stale_seconds()
        self._me = this_worker()
        # Ages are counted by this process's own clock from when it first saw a heartbeat: clocks of hosts differ.
        self._seen: dict[str, tuple[int, float]] = {}
        self._beating: set[str] = set()

    def take(self, name: str) -> "Claim | None":
        """Take the claim on `name`; return None while a living process holds it.

        Raises:
            DiskSpaceError: The disk is full.
            UserError: The folder cannot be written to.
        """
        if self._create(name):
            return Claim(self._path(name), self._me, self._stale_seconds / _BEATS)
        if not self.is_free(name):
            return None
        self._evict(name)
        return Claim(self._path(name), self._me, self._stale_seconds / _BEATS) if self._create(name) else None

    def is_free(self, name: str) -> bool:
        """Return whether no process holds `name`, or its owner is dead."""
        owner = self.owner(name)
        if owner is None:
            return not self._path(name).exists() or self._is_cold(name)
        if owner.worker.token == self._me.token:
            return False
        alive = is_alive(owner.worker)
        return self._is_cold(name) if alive is None else not alive

    def is_beating(self, name: str) -> bool:
        """Return whether the owner of `name` lives: on this host, or by a heartbeat while this process watched."""
        owner = self.owner(name)
        alive = is_alive(owner.worker) if owner else None
        self._is_cold(name)
        return name in self._beating if alive is None else alive

    def owner(self, name: str) -> Owner | None:
        """Return the owner of `name`; None if there is none, or if the file does not read."""
        return read_owner(self._path(name))

    def owners(self) -> dict[str, Owner]:
        """Return every claim whose file reads, by name."""
        owners = {path.stem: read_owner(path) for path in sorted(self._folder.glob("*.json"))}
        return {name: owner for name, owner in owners.items() if owner is not None}

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.json"

    def _create(self, name: str) -> bool:
        path = self._path(name)
        if path.exists():
            return False
        try:
            write_durably(path, [json.dumps([*self._me, time.time()]).encode()], exclusive=True)
        except FileExistsError:
            return False
        return True

    def _evict(self, name: str) -> None:
        """Remove a dead owner's claim; put back one that a living process made in the meantime."""
        dead, away = self.owner(name), self._folder / f".{name}.evicted.{secrets.token_hex(4)}"
        try:
            self._path(name).rename(away)
        except FileNotFoundError:
            return
        if read_owner(away) != dead:
            with contextlib.suppress(OSError):
                os.link(away, self._path(name))
        away.unlink(missing_ok=True)

    def _is_cold(self, name: str) -> bool:
        try:
            touched = self._path(name).stat().st_mtime_ns
        except FileNotFoundError:
            return True
        now = time.monotonic()
        before, since = self._seen.get(name, (touched, now))
        if before != touched:
            self._beating.add(name)
            since = now
        self._seen[name] = (touched, since)
        return now - since > self._stale_seconds


def read_owner(path: Path) -> Owner | None:
    """Return the owner that a claim's file names, None if it does not read."""
    try:
        *worker, since = json.loads(path.read_bytes())
        return Owner(WORKER.validate_python(worker), float(since))
    except (OSError, ValueError, TypeError, RecursionError):
        return None


@final
class Claim:
    """A piece that is this process's; use it as a context, which keeps the claim warm and gives it back."""

    def __init__(self, path: Path, me: Worker, heartbeat_seconds: float) -> None:
        self._path, self._me, self._heartbeat_seconds = path, me, heartbeat_seconds
        self._over = threading.Event()

    def __enter__(self) -> "Claim":
        self._heart = threading.Thread(target=self._beat, name="vestige-claim", daemon=True)
        self._heart.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        owner = read_owner(self._path)
        if owner is None or owner.worker.token == self._me.token:
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._over.wait(self._heartbeat_seconds):
            with contextlib.suppress(OSError):
                os.utime(self._path)
