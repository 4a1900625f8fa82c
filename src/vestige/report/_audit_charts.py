"""Charts of an audit's page as SVG: curves over checkpoints, ROC on logarithmic axes, layers, agreement of measures."""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

WIDTH, HEIGHT = 340, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 10, 34
FLOOR = 1e-3
"""Left and lower end of the logarithmic axes."""


class Line(NamedTuple):
    """One curve, with the ends of its band; NaN leaves a gap."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


class _Frame(NamedTuple):
    """From numbers to places in the drawing."""

    x: tuple[float, float]
    y: tuple[float, float]
    logarithmic: bool

    def place(self, x: float, y: float) -> tuple[float, float]:
        """In units of the drawing."""
        across, up = (self._share(value, ends) for value, ends in ((x, self.x), (y, self.y)))
        return _LEFT + across * (WIDTH - _LEFT - _RIGHT), HEIGHT - _BOTTOM - up * (HEIGHT - _TOP - _BOTTOM)

    def _share(self, value: float, ends: tuple[float, float]) -> float:
        low, high = ends
        if self.logarithmic:
            value, low, high = (math.log10(max(each, FLOOR)) for each in (value, low, high))
        return (value - low) / (high - low) if high > low else 0.5


def curves(lines: Sequence[Line], label: str, *, ticks: Sequence[float] = (), rule: float | None = None) -> str:
    """Curves with their bands over plain axes; empty where nothing is known.

    Args:
        lines: What to draw.
        label: Of the axis across.
        ticks: Places on it that are written out; the ends if not given.
        rule: A level to draw a line at, such as chance.
    """
    every = [
        value for line in lines for part in (line.y, line.low, line.high) for value in part if math.isfinite(value)
    ]
    across = [value for line in lines for value in line.x]
    if not every or not across:
        return ""
    every += [] if rule is None else [rule]
    margin = 0.06 * (max(every) - min(every) or 1.0)
    frame = _Frame((min(across), max(across)), (min(every) - margin, max(every) + margin), False)
    shown = list(ticks) or [min(across), max(across)]
    parts = _axes(frame, shown, _round_ticks(*frame.y), label, "")
    if rule is not None:
        parts.append(_path([frame.place(frame.x[0], rule), frame.place(frame.x[1], rule)], "median"))
    for number, line in enumerate(lines):
        parts.append(_band(frame, line, number))
        parts.append(_path(_known(frame, line.x, line.y), f"line tone-{number}"))
        parts += [
            f'<circle class="dot tone-{number}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>'
            for x, y in _known(frame, line.x, line.y)
        ]
    return _drawing(parts, f"{', '.join(line.name for line in lines)} by {label}")


def roc(lines: Sequence[Line]) -> str:
    """True over false positive rates, both axes logarithmic, with the line of chance."""
    frame = _Frame((FLOOR, 1.0), (FLOOR, 1.0), True)
    decades = [FLOOR, 1e-2, 1e-1, 1.0]
    parts = _axes(frame, decades, decades, "false positive rate", "true positive rate")
    parts.append(_path([frame.place(FLOOR, FLOOR), frame.place(1.0, 1.0)], "median"))
    for number, line in enumerate(lines):
        points: list[tuple[float, float]] = []
        for x, y in zip(line.x, line.y, strict=True):
            here = frame.place(x, y)
            points += ([(here[0], points[-1][1])] if points else []) + [here]
        parts.append(_path(points, f"line tone-{number}"))
    return _drawing(parts, f"ROC curves of {', '.join(line.name for line in lines)}")


def agreement(names: Sequence[str], table: Float[np.ndarray, "one other"]) -> str:
    """A square of rank correlations, each with its number."""
    left, top, size = 104, 84, 30
    parts = []
    for row, name in enumerate(names):
        middle = top + size * row + size / 2 + 3.5
        parts.append(f'<text x="{left - 6}" y="{middle:.1f}" text-anchor="end">{escape(name)}</text>')
        at = left + size * row + size / 2 + 3
        parts.append(
            f'<text x="{at:.1f}" y="{top - 6}" transform="rotate(-52 {at:.1f} {top - 6})">{escape(name)}</text>'
        )
        for column, value in enumerate(table[row]):
            known = math.isfinite(value)
            tone = ("positive" if value > 0 else "negative") if known else "empty-cell"
            tip = f"{name} and {names[column]}: {f'{value:.2f}' if known else 'not known'}"
            x, y = left + size * column, top + size * row
            parts.append(
                f'<rect class="agree {tone}" x="{x}" y="{y}" width="{size - 1}" height="{size - 1}" '
                f'fill-opacity="{abs(value) * 0.75 if known else 1:.2f}"><title>{escape(tip)}</title></rect>'
            )
            text = f"{value:.2f}".replace("-", "−").replace("0.", ".") if known else ""
            parts.append(
                f'<text class="strong" x="{x + size / 2 - 0.5}" y="{y + size / 2 + 3.5}" '
                f'text-anchor="middle">{text}</text>'
            )
    side = size * len(names)
    return _drawing(parts, "Rank correlation of measures", left + side + 60, top + side + 4)


def _axes(frame: _Frame, across: Sequence[float], up: Sequence[float], label: str, side: str) -> list[str]:
    left, bottom = frame.place(frame.x[0], frame.y[0])
    right, top = frame.place(frame.x[1], frame.y[1])
    parts = [f'<path class="axis" fill="none" d="M{left:.1f} {top:.1f}V{bottom:.1f}H{right:.1f}"/>']
    for value in across:
        x, _ = frame.place(value, frame.y[0])
        parts.append(f'<text x="{x:.1f}" y="{bottom + 13:.1f}" text-anchor="middle">{value:g}</text>')
    for value in up:
        _, y = frame.place(frame.x[0], value)
        parts.append(_path([(left, y), (right, y)], "rule"))
        parts.append(
            f'<text x="{left - 5:.1f}" y="{y + 3.5:.1f}" text-anchor="end">{value:g}</text>'.replace(">-", ">−")
        )
    parts.append(f'<text x="{(left + right) / 2:.1f}" y="{HEIGHT - 5}" text-anchor="middle">{escape(label)}</text>')
    if side:
        middle = (top + bottom) / 2
        parts.append(
            f'<text x="10" y="{middle:.1f}" text-anchor="middle" transform="rotate(-90 10 {middle:.1f})">'
            f"{escape(side)}</text>"
        )
    return parts


def _band(frame: _Frame, line: Line, number: int) -> str:
    ends = [
        (x, low, high)
        for x, low, high in zip(line.x, line.low, line.high, strict=False)
        if math.isfinite(low) and math.isfinite(high)
    ]
    if len(ends) < 2:
        return ""
    outline = [frame.place(x, high) for x, _, high in ends] + [frame.place(x, low) for x, low, _ in reversed(ends)]
    return _path(outline, f"spread tone-{number}", closed=True)


def _known(frame: _Frame, x: Sequence[float], y: Sequence[float]) -> list[tuple[float, float]]:
    return [frame.place(one, other) for one, other in zip(x, y, strict=True) if math.isfinite(other)]


def _path(points: Sequence[tuple[float, float]], tone: str, *, closed: bool = False) -> str:
    if not points:
        return ""
    steps = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f'<path class="{tone}" d="M{steps}{"Z" if closed else ""}"/>'


def _drawing(parts: Sequence[str], label: str, width: float = WIDTH, height: float = HEIGHT) -> str:
    size = f'viewBox="0 0 {width:g} {height:g}" style="max-width:{width:g}px"'
    return f'<svg {size} role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def _round_ticks(low: float, high: float) -> list[float]:
    """Three to five round numbers between the ends."""
    step = 10.0 ** math.floor(math.log10((high - low) / 2))
    for factor in (1, 2, 2.5, 5, 10):
        if (high - low) / (step * factor) <= 5:
            step *= factor
            break
    first = math.ceil(low / step)
    return [float(f"{place * step:.10g}") for place in range(first, math.floor(high / step) + 1)]
