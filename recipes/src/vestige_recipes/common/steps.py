"""Steps that several studies take: where work runs, runs that are kept, and intervals in tables and figures."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from vestige.evaluate import Estimate, Mark, interval_figure
from vestige.runs import Scores, is_run
from vestige.settings import LaunchSettings
from vestige.storage import write_durably
from vestige_recipes.common.registry import StudySettings

OWN_SEED = 1_000
"""Of the first model that scores are computed on; those of a bank are drawn from hashes."""
Ends = tuple[float, float, float]
"""A value and the ends of its interval: an `Estimate` or an `Interval`."""


def launched(settings: StudySettings) -> dict[str, Any]:
    """Return the settings of where work runs, as arguments of another command."""
    return {name: getattr(settings, name) for name in LaunchSettings.model_fields}


def kept_run(command: Callable[..., Scores], out: Path, **arguments: Any) -> Scores:
    """Return the run in `out`, which the command computes unless it is there."""
    return Scores.open(out) if is_run(out) else command(**arguments, out=out)


def shown_interval(interval: Ends, digits: int = 3) -> str:
    """Return the ends of an interval as they stand in a table."""
    _, low, high = interval
    return f"{low:.{digits}f} … {high:.{digits}f}"


def draw_intervals(
    folder: Path,
    name: str,
    intervals: Mapping[str, Ends],
    label: str,
    *,
    beside: Collection[str] = (),
    lines: Mapping[str, float] | None = None,
) -> None:
    """Write a figure of intervals into the study's folder, as PNG and PDF; those `beside` stand back."""
    marks = [Mark(kind, Estimate(*each), kind in beside) for kind, each in intervals.items()]
    for file, content in interval_figure(name, marks, label, lines=dict(lines or {})).items():
        write_durably(folder / file, [content])
