"""The ranking of one query as a figure: its strongest rows, and where they stand among all."""

from typing import TYPE_CHECKING

from vestige import runs
from vestige.figures import COLOURS, finish_axes, make_figure
from vestige.terminal import shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_PROPONENTS, _OPPONENTS = 10, 5
_NAME = 40
_REST = "#8A8A8A"


def draw_ranking(scores: "runs.Scores", query: str) -> "Figure":
    """Return a figure of two panels: the first rows and the strongest opponents, and the histogram of all scores."""
    proponents = scores.listed(query, "proponent")[:_PROPONENTS]
    known = {row.row for row in proponents}
    opponents = [row for row in scores.listed(query, "opponent")[:_OPPONENTS] if row.score < 0 and row.row not in known]
    rows = [*proponents, *reversed(opponents)]
    figure, (bars, histogram) = make_figure(10.0, 1.4 + 0.28 * max(len(rows), 6), 1, 2)
    colours = [COLOURS[1] if row.score < 0 else COLOURS[0] for row in rows]
    bars.barh(range(len(rows)), [row.score for row in rows], color=colours)
    # A dollar sign in an id begins no formula.
    bars.set_yticks(range(len(rows)), [shorten(row.example_id, _NAME) for row in rows], parse_math=False)
    bars.invert_yaxis()
    bars.axvline(0, color="#BBBBBB", linewidth=0.9, zorder=0)
    finish_axes(bars, "score", "", "x")
    _draw_histogram(histogram, scores, query, [row.score for row in rows])
    figure.suptitle(shorten(scores.query(query).question or query, 100), fontsize="medium", parse_math=False)
    return figure


def _draw_histogram(axes: "Axes", scores: "runs.Scores", query: str, marks: list[float]) -> None:
    found = scores.run.distribution.get(query)
    if found is not None:
        axes.stairs(found.counts, found.edges, fill=True, color=_REST, alpha=0.6)
        axes.set_yscale("symlog")
    axes.plot(marks, [0] * len(marks), "|", color=COLOURS[0], markersize=12, clip_on=False)
    finish_axes(axes, "score", "training examples", "y")
