"""What a rank of torchrun does that is not the first: it helps, and waits for the result that the first one writes."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from vestige.errors import VestigeError
from vestige.launch._loop import POLL_SECONDS
from vestige.launch._role import this_role


def is_follower() -> bool:
    """Return whether torchrun or accelerate started this process as a rank that leaves writing to the first one."""
    role = this_role()
    return role.kind == "rank" and role.number > 0


def follow(result: Path, work: Callable[[], object]) -> None:
    """Do `work` as far as it is needed, and wait until the first rank has written the file `result`.

    The first rank may be done with everything, and tidy up, before this one checks. Should the first one fail,
    torchrun ends the others.
    """
    launched = psutil.Process(os.getppid()).create_time()

    def is_written() -> bool:
        try:
            return result.stat().st_mtime >= launched
        except OSError:
            return False

    try:
        if not is_written():
            work()
    except (VestigeError, OSError):
        if not is_written():
            raise
    while not is_written():
        time.sleep(POLL_SECONDS)
