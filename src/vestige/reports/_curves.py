"""Curves with their bands over plain axes, as SVG."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from vestige.reports._drawing import HEIGHT, WIDTH, Frame, Tick, axes, drawing, path, round_ticks


class Line(NamedTuple):
    """One curve, with the ends of its band; NaN leaves a gap."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    tone: int | None = None
    """Its colour; by its position among the lines if not given."""
    dashed: bool = False


def curves(
    lines: Sequence[Line],
    label: str,
    *,
    side: str = "",
    ticks: Sequence[Tick] = (),
    rule: float | None = None,
    width: float = WIDTH,
    height: float = HEIGHT,
    dots: bool = True,
) -> str:
    """Draw curves with their bands over plain axes; empty where nothing is known.

    Args:
        lines: What to draw.
        label: Of the axis across.
        side: Of the axis that goes up.
        ticks: Positions on the one across that are written out; its ends if not given.
        rule: A level to draw a line at, such as chance.
        width: Of the drawing.
        height: The same upwards.
        dots: Whether every point gets one.
    """
    every = [
        value for line in lines for part in (line.y, line.low, line.high) for value in part if math.isfinite(value)
    ]
    across = [value for line in lines for value in line.x]
    if not every or not across:
        return ""
    every += [] if rule is None else [rule]
    margin = 0.06 * (max(every) - min(every) or 1.0)
    frame = Frame((min(across), max(across)), (min(every) - margin, max(every) + margin), width=width, height=height)
    shown = list(ticks) or [min(across), max(across)]
    parts = axes(frame, shown, round_ticks(*frame.y), label, side)
    if rule is not None:
        parts.append(path([frame.place(frame.x[0], rule), frame.place(frame.x[1], rule)], "median"))
    for number, line in enumerate(lines):
        tone = f"tone-{number if line.tone is None else line.tone}"
        points = _known(frame, line.x, line.y)
        parts += [_band(frame, line, tone), path(points, f"line {tone}{' dashed' if line.dashed else ''}")]
        parts += [f'<circle class="dot {tone}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in points if dots]
    return drawing(parts, f"{', '.join(line.name for line in lines)} by {label}", width, height)


def _band(frame: Frame, line: Line, tone: str) -> str:
    ends = [
        (x, low, high)
        for x, low, high in zip(line.x, line.low, line.high, strict=False)
        if math.isfinite(low) and math.isfinite(high)
    ]
    if len(ends) < 2:
        return ""
    outline = [frame.place(x, high) for x, _, high in ends] + [frame.place(x, low) for x, low, _ in reversed(ends)]
    return path(outline, f"spread {tone}", closed=True)


def _known(frame: Frame, x: Sequence[float], y: Sequence[float]) -> list[tuple[float, float]]:
    return [frame.place(one, other) for one, other in zip(x, y, strict=True) if math.isfinite(other)]
