"""Figures of evaluations, as PDF and PNG: intervals, curves, a matrix of methods."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np

from vestige.evaluate._result import Estimate, EvaluationRow
from vestige.figures import COLOURS, finish_axes, make_figure, render_figure

MARKERS = "osD^vP*X<>"
_BASELINE = "#8A8A8A"
_FEW = 8
"""Up to this number of positions on an axis, each is written out."""


class Mark(NamedTuple):
    """One method's number."""

    name: str
    estimate: Estimate
    opponent: bool = False

    @classmethod
    def of(cls, row: EvaluationRow, column: str) -> "Mark":
        """Return the mark of one number of a row."""
        return cls(row.method, cast(Estimate, row.values[column]), row.opponent)


class Line(NamedTuple):
    """One method's curve."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    spread: Sequence[float] | None = None
    """Half the height of the band around it."""
    opponent: bool = False


def interval_figure(
    name: str, marks: Sequence[Mark], label: str, *, lines: Mapping[str, float] | None = None
) -> dict[str, bytes]:
    """Draw methods from best to worst with their intervals; `lines` are upright ones, such as a noise ceiling."""
    known = sorted((mark for mark in marks if mark.estimate.is_known), key=lambda mark: mark.estimate.value)
    figure, (axes,) = make_figure(7.2, 1.3 + 0.34 * max(len(known), 1))
    for place, mark in enumerate(known):
        value, low, high = mark.estimate
        colour = _BASELINE if mark.opponent else COLOURS[0]
        if np.isfinite(low):
            axes.plot([low, high], [place, place], color=colour, linewidth=2.2, solid_capstyle="round", alpha=0.55)
        axes.plot([value], [place], "o", color=colour, markersize=6)
        axes.annotate(
            f"{value:.3g}", (value, place), (0, 5), textcoords="offset points", ha="center", fontsize="x-small"
        )
    axes.axvline(0, color="#BBBBBB", linewidth=0.9, zorder=0)
    upright = {words: value for words, value in (lines or {}).items() if np.isfinite(value)}
    for value in upright.values():
        axes.axvline(value, color="#D55E00", linestyle=":", linewidth=1.3, zorder=0)
    if upright:
        words = ", ".join(f"{each} {value:.3f}" for each, value in upright.items())
        axes.set_title(f"dotted: {words}", fontsize="small", color="#D55E00", loc="right")
    axes.set_yticks(range(len(known)), [mark.name for mark in known])
    axes.set_ylim(-0.6, len(known) - 0.3)
    finish_axes(axes, label, "", "x")
    return render_figure(figure, name)


def line_figure(name: str, lines: Sequence[Line], x_label: str, y_label: str) -> dict[str, bytes]:
    """Draw curves by method, baselines with dashes."""
    figure, (axes,) = make_figure(7.2, 4.2)
    for number, line in enumerate(lines):
        colour = COLOURS[number % len(COLOURS)]
        style: dict[str, Any] = {"linestyle": "--" if line.opponent else "-", "marker": MARKERS[number % 8]}
        # A curve of many points is its own mark.
        every = max(1, len(line.x) // 8)
        axes.plot(line.x, line.y, color=colour, label=line.name, markersize=5, linewidth=1.5, markevery=every, **style)
        if line.spread is not None:
            low, high = (np.array(line.y) + sign * np.array(line.spread) for sign in (-1, 1))
            axes.fill_between(line.x, low, high, color=colour, alpha=0.09, linewidth=0)
    places = sorted({x for line in lines for x in line.x})
    if 1 < len(places) <= _FEW:
        axes.set_xticks(places, [f"{place:g}" for place in places])
    finish_axes(axes, x_label, y_label, legend=bool(lines))
    return render_figure(figure, name)


def matrix_figure(name: str, names: Sequence[str], values: np.ndarray, label: str) -> dict[str, bytes]:
    """Draw a coloured matrix of methods with its numbers written in."""
    size = max(4.0, 2.2 + 0.62 * len(names))
    figure, (axes,) = make_figure(size + 0.8, size)
    image = axes.imshow(values, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(*values.shape):
        value = values[row, column]
        words = f"{value:.2f}" if np.isfinite(value) else "–"
        colour = "white" if value > 0.6 else "#333333"
        axes.text(column, row, words, ha="center", va="center", fontsize="small", color=colour)
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    figure.colorbar(image, ax=axes, label=label, shrink=0.8)
    return render_figure(figure, name)
