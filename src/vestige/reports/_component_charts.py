"""Charts of a component search as SVG: bars over the components, boxes by size, paths, and intervals in a table."""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np

from vestige.reports._drawing import HEIGHT, WIDTH, Frame, Tick, axes, drawing, path, round_ticks
from vestige.reports._header import compact

BROAD = 1080
"""Width of a drawing that has the page to itself."""
_ROW = (150, 16)
"""Width and height of an interval in a table."""


class Bar(NamedTuple):
    """One component's bar."""

    name: str
    value: float
    tone: int


class Mark(NamedTuple):
    """A point beside the paths; `shape` is diamond, cross or star."""

    name: str
    x: float
    y: float
    shape: str
    tone: int
    label: str = ""


class Course(NamedTuple):
    """One greedy path: shares of the parameters, and what they reach."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    tone: int


def bars(
    parts: Sequence[Bar], side: str, ticks: Sequence[Tick], *, full: float | None = None, chance: float | None = None
) -> str:
    """Draw a bar for each component in the order of the model; lines at the full gradient and at chance."""
    values = [bar.value for bar in parts if math.isfinite(bar.value)]
    if not values:
        return ""
    top = max([*values, *(level for level in (full, chance) if level is not None)])
    low = min(0.0, *values)
    frame = Frame((-0.5, len(parts) - 0.5), (low, top + 0.06 * (top - low or 1.0)), width=BROAD, height=230)
    return _bars(frame, parts, axes(frame, ticks, round_ticks(*frame.y), "block", side), side, (full, chance), low)


def size_bars(parts: Sequence[Bar], side: str, ticks: Sequence[Tick]) -> str:
    """Draw a bar for the size of each component, on a logarithmic axis."""
    logarithms = [bar._replace(value=math.log10(max(bar.value, 1))) for bar in parts]
    low = math.floor(min(bar.value for bar in logarithms))
    high = max(math.ceil(max(bar.value for bar in logarithms)), low + 1)
    frame = Frame((-0.5, len(parts) - 0.5), (low, high), width=BROAD, height=230)
    decades = [(float(power), compact(10.0**power)) for power in range(low, high + 1)]
    return _bars(frame, logarithms, axes(frame, ticks, decades, "block", ""), side, (None, None), low)


def _bars(
    frame: Frame,
    parts: Sequence[Bar],
    drawn: list[str],
    side: str,
    levels: tuple[float | None, float | None],
    low: float,
) -> str:
    for number, bar in enumerate(parts):
        if math.isfinite(bar.value):
            left, end = frame.place(number - 0.42, bar.value)
            right, start = frame.place(number + 0.42, max(low, 0))
            drawn.append(
                f'<rect class="column tone-{bar.tone}" x="{left:.1f}" y="{min(start, end):.1f}" '
                f'width="{max(right - left, 0.6):.1f}" height="{abs(start - end):.1f}">'
                f"<title>{escape(bar.name)}</title></rect>"
            )
    for level, tone in zip(levels, ("full", "median"), strict=True):
        if level is not None:
            drawn.append(path([frame.place(frame.x[0], level), frame.place(frame.x[1], level)], tone))
    return drawing(drawn, f"{side} of {len(parts)} components", frame.width, frame.height)


def boxes(groups: Sequence[tuple[str, Sequence[float]]], label: str, side: str, level: float) -> str:
    """Draw quartiles of each group with all its points, and a line at the full gradient's level."""
    every = [value for _, values in groups for value in values] + [level]
    margin = 0.06 * (max(every) - min(every) or 1.0)
    frame = Frame((-0.5, len(groups) - 0.5), (min(every) - margin, max(every) + margin))
    names: list[Tick] = [(float(place), name) for place, (name, _) in enumerate(groups)]
    drawn = axes(frame, names, round_ticks(*frame.y), label, side)
    drawn.append(path([frame.place(frame.x[0], level), frame.place(frame.x[1], level)], "full"))
    for place, (_, values) in enumerate(groups):
        quarter, middle, most = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
        corners = [(place - 0.3, quarter), (place - 0.3, most), (place + 0.3, most), (place + 0.3, quarter)]
        drawn.append(path([frame.place(*corner) for corner in corners], "box tone-0", closed=True))
        drawn.append(path([frame.place(place - 0.3, middle), frame.place(place + 0.3, middle)], "line tone-0"))
        for value in values:
            x, y = frame.place(place, value)
            drawn.append(f'<circle class="dot faint tone-0" cx="{x:.1f}" cy="{y:.1f}" r="2.2"/>')
    return drawing(drawn, f"{side} by {label}")


def courses(lines: Sequence[Course], marks: Sequence[Mark], side: str, level: float) -> str:
    """Draw paths over the share of parameters, on a logarithmic axis, with marks beside them and a line at `level`."""
    shares = [share for line in lines for share in line.x if share > 0] + [mark.x for mark in marks if mark.x > 0]
    values = [value for line in lines for value in line.y] + [mark.y for mark in marks] + [level]
    values = [value for value in values if math.isfinite(value)]
    if not shares or not values:
        return ""
    low, margin = math.floor(math.log10(min(shares)) - 0.1), 0.06 * (max(values) - min(values) or 1.0)
    frame = Frame((low, 2.05), (min(values) - margin, max(values) + margin), width=1.4 * WIDTH, height=1.3 * HEIGHT)
    decades: list[Tick] = [(float(power), f"{10.0**power:g} %") for power in range(low, 3)]
    drawn = axes(frame, decades, round_ticks(*frame.y), "share of the parameters (of projections: numbers kept)", side)
    drawn.append(path([frame.place(frame.x[0], level), frame.place(frame.x[1], level)], "full"))
    for line in lines:
        points = [
            frame.place(math.log10(x), y) for x, y in zip(line.x, line.y, strict=True) if x > 0 and math.isfinite(y)
        ]
        drawn.append(path(points, f"line tone-{line.tone}"))
    known = [mark for mark in marks if mark.x > 0 and math.isfinite(mark.y)]
    places = [frame.place(math.log10(mark.x), mark.y) for mark in known]
    drawn += [_mark(mark, *place) for mark, place in zip(known, places, strict=True)]
    drawn += _labels(known, places)
    return drawing(drawn, f"{side} along greedy paths", frame.width, frame.height)


def _mark(mark: Mark, x: float, y: float) -> str:
    shapes = {
        "diamond": f"M{x:.1f} {y - 4.5:.1f}l4.5 4.5l-4.5 4.5l-4.5 -4.5Z",
        "cross": f"M{x - 3.5:.1f} {y - 3.5:.1f}l7 7m0 -7l-7 7",
        "star": f"M{x - 5:.1f} {y:.1f}a5 5 0 1 0 10 0a5 5 0 1 0 -10 0Z",
    }
    tip = f"<title>{escape(mark.name)}: {mark.y:.3f} at {mark.x:.2g} %</title>"
    return f'<path class="mark {mark.shape} tone-{mark.tone}" d="{shapes[mark.shape]}">{tip}</path>'


def _labels(marks: Sequence[Mark], places: Sequence[tuple[float, float]]) -> list[str]:
    """Write names beside the marks; one that would cover another is only shown at the pointer."""
    written: list[tuple[float, float]] = []
    texts = []
    for mark, (x, y) in zip(marks, places, strict=True):
        if mark.label and all(abs(x - other) > 46 or abs(y - height) > 10 for other, height in written):
            written.append((x, y))
            texts.append(f'<text class="strong" x="{x + 7:.1f}" y="{y + 3.5:.1f}">{escape(mark.label)}</text>')
    return texts


def interval(value: float, low: float, high: float, ends: tuple[float, float], level: float) -> str:
    """Draw a value with its interval between `ends`, small enough for a cell; an upright line stands at `level`.

    What lies beyond the ends is an arrow at the edge.
    """
    width, height = _ROW

    def place(number: float) -> float:
        share = (number - ends[0]) / (ends[1] - ends[0]) if ends[1] > ends[0] else 0.5
        return 4 + share * (width - 8)

    middle, at = height / 2, place(level)
    parts = [path([(at, 0.0), (at, float(height))], "full")]
    label = f"{value:.3f}, from {low:.3f} to {high:.3f}"
    if not ends[0] <= value <= ends[1]:
        x, way = (2, 1) if value < ends[0] else (width - 2, -1)
        parts.append(path([(x + 6 * way, middle - 4), (x, middle), (x + 6 * way, middle + 4)], "line tone-9"))
        return drawing(parts, label, width, height)
    low, high = (min(max(end, ends[0]), ends[1]) if math.isfinite(end) else end for end in (low, high))
    if math.isfinite(low) and math.isfinite(high):
        parts.append(path([(place(low), middle), (place(high), middle)], "line tone-0"))
    parts.append(f'<circle class="dot tone-0" cx="{place(value):.1f}" cy="{middle:g}" r="3"/>')
    return drawing(parts, label, width, height)
