"""Figures of evaluations, as PDF and PNG with equal bytes for equal numbers: intervals, curves, a matrix of methods."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any, Literal, NamedTuple, cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vestige.evaluate._result import Estimate, EvaluationRow

# Okabe and Ito's colours, which colour-blind readers can distinguish.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A5A2B", "#7A4FBF")
MARKERS = "osD^vP*X<>"
_BASELINE = "#8A8A8A"
_DOTS = 160
_FEW = 8
"""Up to this number of positions on an axis, each is written out."""


def make_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """Return an empty figure, sizes in inches, and its panels row by row."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(rows, columns, place + 1) for place in range(rows * columns)]


def finish_axes(axes: Axes, x: str, y: str, grid: Literal["x", "y", "both"] = "both", *, legend: bool = False) -> None:
    """Label the axes, draw the grid, and put the legend beside them."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(visible=True, axis=grid, color="#E4E4E4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize="small")


def render_figure(figure: Figure, name: str) -> dict[str, bytes]:
    """Return the figure's files by name; a date would make two equal figures differ."""
    files = {}
    for kind, metadata in (("pdf", {"CreationDate": None}), ("png", {"Software": None})):
        content = BytesIO()
        figure.savefig(content, format=kind, dpi=_DOTS, metadata=metadata)  # type: ignore[arg-type]
        files[f"{name}.{kind}"] = content.getvalue()
    return files


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
