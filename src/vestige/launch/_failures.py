"""What a person reads when pieces failed: which, why, where the log is, and how to go on."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from vestige import errors
from vestige.errors import PieceFailed, UserError
from vestige.launch._record import Failure

_SHOWN = 5
_TAIL_LINES = 12


def ranges(numbers: Iterable[int]) -> str:
    """Format numbers as people and SLURM write them: 0-3,7,9-11."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def failed(name: str, pieces: int, failures: Sequence[Failure]) -> UserError:
    """Return the error to raise for these failures; one that the user can fix keeps its class and its words."""
    for failure in failures:
        if failure.fatal:
            kind = getattr(errors, failure.kind, PieceFailed)
            log = f"\nThe log is {failure.log}." if failure.log else ""
            return kind(f"{failure.error}{log}")
    shown = "\n".join(_described(failure) for failure in failures[:_SHOWN])
    more = f"\n... and {len(failures) - _SHOWN} more." if len(failures) > _SHOWN else ""
    numbers = ranges(failure.piece for failure in failures)
    return PieceFailed(
        f"{name}: {len(failures)} of {pieces} pieces failed every time ({numbers}); the others went on.\n"
        f"{shown}{more}\nFix the cause and run the same command again: only what is missing is computed."
    )


def _described(failure: Failure) -> str:
    times = "once" if failure.attempts == 1 else f"{failure.attempts} times"
    head = f"  piece {failure.piece}, {times}, on {failure.host}: {failure.kind}: {failure.error}"
    if failure.log:
        head += f"\n    log: {failure.log}"
    lines = failure.traceback.rstrip().splitlines() or tail(failure.log)
    return "\n".join([head, *(f"    {line}" for line in lines[-_TAIL_LINES:])])


def tail(log: str) -> list[str]:
    """Return the last lines of a log, none if it cannot be read."""
    try:
        return Path(log).read_text(errors="replace").splitlines()[-_TAIL_LINES:] if log else []
    except OSError:
        return []
