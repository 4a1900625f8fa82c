"""The progress of work: a bar with rate and time left, or plain lines where stderr is no terminal.

Everything goes to stderr, so that a command's answer on stdout stays clean; `VESTIGE_QUIET=1` silences it.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from vestige.terminal import say

SECONDS_BETWEEN_LINES = 10.0
"""Plain lines come at most this often: a log of an hour's work stays readable."""


class Progress:
    """Counts finished units of work; this one shows nothing."""

    def advance(self, n: int = 1) -> None:
        """Note that `n` more units are done."""

    def note(self, text: str) -> None:
        """Show a measurement, such as "loss 2.31", beside the rate from now on."""


def announce(line: str) -> None:
    """Show one line on stderr, unless `VESTIGE_QUIET` is set."""
    if not _quiet():
        say(line, file=sys.stderr)


def quiet(wanted: bool = True) -> AbstractContextManager[None]:
    """Show nothing that begins while the block runs, if that is `wanted`."""
    return manner(quiet=wanted, verbose=False)


@contextmanager
def manner(*, quiet: bool, verbose: bool) -> Iterator[None]:
    """Show as much as was requested while the block runs, also in processes that it starts.

    Args:
        quiet: Neither progress nor announcements, as with `VESTIGE_QUIET=1`.
        verbose: Also what libraries log and warn of, as with `VESTIGE_VERBOSE=1`.
    """
    wanted = [name for name, on in (("VESTIGE_QUIET", quiet), ("VESTIGE_VERBOSE", verbose)) if on]
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(dict.fromkeys(wanted, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def is_verbose() -> bool:
    """Return whether what libraries log and warn of is to be shown."""
    return os.environ.get("VESTIGE_VERBOSE", "") not in ("", "0")


@contextmanager
def progress(
    total: int, label: str, unit: str = "examples", clock: Callable[[], float] = time.monotonic
) -> Iterator[Progress]:
    """Show how far `total` units of work have come, for as long as the block runs.

    On a terminal a bar with rate and time left; elsewhere a first line, a last line and at most one every ten
    seconds between them; nothing at all with `VESTIGE_QUIET=1`.

    Args:
        total: Units of work; `advance` may stop short of it when the block is left early.
        label: What is being done, such as "Indexing".
        unit: What is counted, in the plural.
        clock: Seconds, for plain lines.
    """
    if _quiet():
        yield Progress()
    elif sys.stderr.isatty():
        with _bar(total, label, unit) as bar:
            yield bar
    else:
        lines = _PlainLines(total, label, unit, clock)
        yield lines
        lines.close()


def format_count(count: float) -> str:
    """Return a count as a reader says it: 912, 12,480, 134.5 M, 7.2 B."""
    for size, letter in ((1e9, "B"), (1e6, "M")):
        if count >= size:
            return f"{count / size:.1f} {letter}"
    return f"{count:,.0f}"


def format_units(count: int, unit: str) -> str:
    """Return a number of units for reading, with the unit (a plural in s) in the singular for one: 1 layer."""
    one = f"{unit[:-3]}y" if unit.endswith("ies") else unit.removesuffix("s")
    return f"{count:,} {one if count == 1 else unit}"


def format_bytes(n: float) -> str:
    """Return a size for reading, in decimal units: 999 B, 1.5 kB, 20 GB."""
    if n < 1000:
        return f"{int(n)} B"
    for name in ("kB", "MB", "GB", "TB", "PB"):
        n /= 1000
        # 999.5 would round to "1000 kB"; it belongs to the next unit.
        if n < 999.5 or name == "PB":
            break
    return f"{n:.1f} {name}" if n < 9.95 else f"{n:.0f} {name}"


def format_memory(process: int, gpu: int = 0) -> str:
    """Return the peak memory of a process, and of its CUDA device where one was used, for reading."""
    own = f"{format_bytes(process)} of memory"
    return f"{own}, {format_bytes(gpu)} on the GPU" if gpu else own


def format_seconds(seconds: float) -> str:
    """Return a duration for reading: 0.3 s, 45 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min"


def _quiet() -> bool:
    return os.environ.get("VESTIGE_QUIET", "") not in ("", "0")


class _PlainLines(Progress):
    """Progress for logs and pipes."""

    def __init__(self, total: int, label: str, unit: str, clock: Callable[[], float]) -> None:
        self._total, self._label, self._unit, self._clock = total, label, unit, clock
        self._done, self._note = 0, ""
        self._start = self._last_line = clock()
        announce(f"{label}: {format_units(total, unit)}")

    def advance(self, n: int = 1) -> None:
        self._done += n
        now = self._clock()
        if now - self._last_line >= SECONDS_BETWEEN_LINES and self._done < self._total:
            self._last_line = now
            rate = self._done / (now - self._start)
            left = (self._total - self._done) / rate if rate else float("inf")
            remaining = f", {format_seconds(left)} left" if rate else ""
            announce(f"{self._label}: {self._count()}, {rate:,.1f} {self._unit}/s{self._note}{remaining}")

    def note(self, text: str) -> None:
        self._note = f", {text}"

    def close(self) -> None:
        seconds = self._clock() - self._start
        announce(f"{self._label}: {self._count()} in {format_seconds(seconds)}{self._note}")

    def _count(self) -> str:
        return f"{self._done:,} of {format_units(self._total, self._unit)}"


@contextmanager
def _bar(total: int, label: str, unit: str) -> Iterator[Progress]:
    # rich costs 50 ms to import, which `vestige --help` should not pay.
    from rich import progress as rich
    from rich.console import Console

    columns = (
        "{task.description}",
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        "{task.fields[rate]}",
        "{task.fields[note]}",
        rich.TimeElapsedColumn(),
        "left",
        rich.TimeRemainingColumn(),
    )
    # The terminal itself: a unit of work may have redirected its own output to a file.
    with rich.Progress(*columns, console=Console(file=sys.stderr)) as display:
        task = display.add_task(label, total=total, rate="", note="")

        class Bar(Progress):
            def advance(self, n: int = 1) -> None:
                speed = display.tasks[0].speed
                display.update(task, advance=n, rate=f"{speed:,.1f} {unit}/s" if speed else "")

            def note(self, text: str) -> None:
                display.update(task, note=text)

        yield Bar()
