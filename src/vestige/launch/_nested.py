"""Jobs inside a piece of another job."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from vestige.launch._role import VARIABLE

_PARTS = (VARIABLE, "RANK", "WORLD_SIZE")
"""What tells a process its part in a job; the number that chooses its graphics card stays."""


@contextmanager
def own_jobs() -> Iterator[None]:
    """While the block runs, this process starts jobs of its own, whatever its part in the job around it.

    For a piece that is itself a verb: without this, a verb inside a worker would take itself for a worker of its own
    job, and wait for a driver that there is not.
    """
    before = {name: os.environ.pop(name) for name in _PARTS if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)
