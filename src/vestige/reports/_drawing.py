"""What drawings are made of: a frame from numbers to positions, axes, paths and the SVG around them."""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 340, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 10, 34
FLOOR = 1e-3
"""Left and lower end of logarithmic axes."""

Tick = float | tuple[float, str]
"""A position on an axis, and what is written there if not the number."""


class Frame(NamedTuple):
    """The map from numbers to positions in the drawing."""

    x: tuple[float, float]
    y: tuple[float, float]
    logarithmic: bool = False
    width: float = WIDTH
    height: float = HEIGHT

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Return the position of a point in units of the drawing."""
        across, up = (self._share(value, ends) for value, ends in ((x, self.x), (y, self.y)))
        return (
            _LEFT + across * (self.width - _LEFT - _RIGHT),
            self.height - _BOTTOM - up * (self.height - _TOP - _BOTTOM),
        )

    def _share(self, value: float, ends: tuple[float, float]) -> float:
        low, high = ends
        if self.logarithmic:
            value, low, high = (math.log10(max(each, FLOOR)) for each in (value, low, high))
        return (value - low) / (high - low) if high > low else 0.5


def axes(frame: Frame, across: Sequence[Tick], up: Sequence[Tick], label: str, side: str) -> list[str]:
    """Draw both axes with their ticks; the label stands below, what goes up at the side."""
    left, bottom = frame.place(frame.x[0], frame.y[0])
    right, top = frame.place(frame.x[1], frame.y[1])
    parts = [f'<path class="axis" fill="none" d="M{left:.1f} {top:.1f}V{bottom:.1f}H{right:.1f}"/>']
    for value, text in map(_named, across):
        x, _ = frame.place(value, frame.y[0])
        parts.append(f'<text x="{x:.1f}" y="{bottom + 13:.1f}" text-anchor="middle">{escape(text)}</text>')
    for value, text in map(_named, up):
        _, y = frame.place(frame.x[0], value)
        parts.append(path([(left, y), (right, y)], "rule"))
        parts.append(f'<text x="{left - 5:.1f}" y="{y + 3.5:.1f}" text-anchor="end">{escape(text)}</text>')
    middle = (left + right) / 2
    parts.append(f'<text x="{middle:.1f}" y="{frame.height - 5:g}" text-anchor="middle">{escape(label)}</text>')
    if side:
        middle = (top + bottom) / 2
        parts.append(
            f'<text x="10" y="{middle:.1f}" text-anchor="middle" transform="rotate(-90 10 {middle:.1f})">'
            f"{escape(side)}</text>"
        )
    return parts


def _named(tick: Tick) -> tuple[float, str]:
    return tick if isinstance(tick, tuple) else (tick, f"{tick:g}".replace("-", "−"))


def path(points: Sequence[tuple[float, float]], tone: str, *, closed: bool = False) -> str:
    """Draw a line through points, or the area that it encloses; nothing without points."""
    if not points:
        return ""
    steps = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f'<path class="{tone}" d="M{steps}{"Z" if closed else ""}"/>'


def drawing(parts: Sequence[str], label: str, width: float = WIDTH, height: float = HEIGHT) -> str:
    """Return the SVG of the parts, which have been escaped."""
    size = f'viewBox="0 0 {width:g} {height:g}" style="max-width:{width:g}px"'
    return f'<svg {size} role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def round_ticks(low: float, high: float) -> list[float]:
    """Return three to five round numbers between the ends."""
    step = 10.0 ** math.floor(math.log10((high - low) / 2))
    for factor in (1, 2, 2.5, 5, 10):
        if (high - low) / (step * factor) <= 5:
            step *= factor
            break
    first = math.ceil(low / step)
    return [float(f"{place * step:.10g}") for place in range(first, math.floor(high / step) + 1)]
