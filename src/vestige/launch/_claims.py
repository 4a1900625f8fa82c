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

from vestige.errors import SpecError
from vestige.launch._identity import WORKER, Worker, is_alive, this_worker
from vestige.storage import write_durably

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

    def held(self) -> dict[str, Owner]:
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
