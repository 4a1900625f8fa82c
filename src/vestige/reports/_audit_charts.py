"""Charts of an audit's page as SVG: ROC curves on logarithmic axes, and the agreement of measures."""

import math
from collections.abc import Sequence
from html import escape

import numpy as np
from jaxtyping import Float

from vestige.reports._curves import Line
from vestige.reports._drawing import FLOOR, Frame, axes, drawing, path


def roc(lines: Sequence[Line]) -> str:
    """Draw true over false positive rates, both axes logarithmic, with the line of chance."""
    frame = Frame((FLOOR, 1.0), (FLOOR, 1.0), True)
    decades = [FLOOR, 1e-2, 1e-1, 1.0]
    parts = axes(frame, decades, decades, "false positive rate", "true positive rate")
    parts.append(path([frame.place(FLOOR, FLOOR), frame.place(1.0, 1.0)], "median"))
    for number, line in enumerate(lines):
        points: list[tuple[float, float]] = []
        for x, y in zip(line.x, line.y, strict=True):
            here = frame.place(x, y)
            points += ([(here[0], points[-1][1])] if points else []) + [here]
        parts.append(path(points, f"line tone-{number}"))
    return drawing(parts, f"ROC curves of {', '.join(line.name for line in lines)}")


def agreement(names: Sequence[str], table: Float[np.ndarray, "one other"]) -> str:
    """Draw a square of rank correlations, each with its number."""
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
    return drawing(parts, "Rank correlation of measures", left + side + 60, top + side + 4)
