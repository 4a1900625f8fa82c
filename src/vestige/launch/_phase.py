"""What a phase of the work says when it is done: how fast it was, and where the time went."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vestige.launch._follow import is_follower
from vestige.lockstep import is_first
from vestige.progress import announce, format_seconds
from vestige.storage import write_durably
from vestige.timing import Profile, profile_phases

PROFILE_FILE = "profile.json"


@contextmanager
def phase(label: str, unit: str) -> Iterator[list[int]]:
    """Show the rate of a phase when the block ends without an error: what was appended to the list, per second.

    Units that were done before, by another process or a run that was killed, are not appended: a rate is that of the
    work done here.
    """
    started, done = time.perf_counter(), list[int]()
    yield done
    seconds, units = time.perf_counter() - started, sum(done)
    if units:
        announce(f"{label}: {units:,} {unit} in {format_seconds(seconds)}, {units / max(seconds, 1e-9):,.0f} {unit}/s")


@contextmanager
def profile(wanted: bool) -> Iterator[Profile | None]:
    """Measure the block if `wanted`, and show the table when it ends without an error."""
    with profile_phases(wanted) as measured:
        yield measured
    if measured is not None:
        announce(measured.table())


def write_profile(measured: Profile | None, folder: Path) -> None:
    """Write `profile.json` into the folder, if anything was measured; of several ranks, that of the first."""
    if measured is not None and is_first() and not is_follower():
        write_durably(folder / PROFILE_FILE, [(json.dumps(measured.record(), indent=1) + "\n").encode()])
