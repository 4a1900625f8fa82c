"""The outcome of an evaluation: estimates with intervals, a row for each method, its table, JSON and figures."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from jaxtyping import Bool, Float
from rich.console import Group
from rich.table import Table
from scipy.stats import rankdata

from vestige.errors import CorruptFile, IndexMismatch, differences
from vestige.evaluate._scored import Scored
from vestige.figures import COLOURS, choose_colours, finish_axes, make_figure, render_figure
from vestige.parsing import parse_object
from vestige.progress import format_bytes, format_seconds
from vestige.storage import make_folder, remove_strays_of, require_no_others, write_durably
from vestige.terminal import as_text, shorten

CONFIDENCE = 0.95
MARKERS = "osD^vP*X<>"
_BASELINE = "#8A8A8A"
_FEW = 8
"""Up to this number of positions on an axis, each is written out."""


class Estimate(NamedTuple):
    """A number with the ends of its 95 % interval; the ends are NaN where nothing could be resampled."""

    value: float
    low: float
    high: float

    @property
    def is_known(self) -> bool:
        """True if there is a number at all."""
        return bool(np.isfinite(self.value))


def pearson(
    first: Float[np.ndarray, "row column"], second: Float[np.ndarray, "row column"]
) -> Float[np.ndarray, "column"]:
    """Return the correlation of each column of `first` with the same column of `second`.

    NaN where there is nothing to correlate: a side that does not vary, or a value that is not finite.
    """
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    usable = np.isfinite(first).all(0) & np.isfinite(second).all(0)
    # Compared before centring, which leaves rounding where all values are equal.
    usable &= (first != first[:1]).any(0) & (second != second[:1]).any(0)
    first, second = (np.where(usable, values, 0.0) for values in (first, second))
    first, second = first - first.mean(0), second - second.mean(0)
    spread = np.sqrt((first**2).sum(0) * (second**2).sum(0))
    usable &= spread > 0
    return np.where(usable, (first * second).sum(0) / np.where(usable, spread, 1.0), np.nan)


def spearman(
    first: Float[np.ndarray, "row column"], second: Float[np.ndarray, "row column"]
) -> Float[np.ndarray, "column"]:
    """Rank correlation of each column of `first` with the same column of `second`; ties share their mean rank.

    NaN where there is nothing to correlate: a side that does not vary, or a value that is not finite.
    """
    usable = np.isfinite(first).all(0) & np.isfinite(second).all(0)
    ranks = (rankdata(np.where(usable, values, 0.0), axis=0) for values in (first, second))
    return np.where(usable, pearson(*ranks), np.nan)


def mean_of_known(values: Float[np.ndarray, "item"]) -> float:
    """Return the mean of what is not NaN; NaN where nothing is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def make_interval(value: float, draws: Float[np.ndarray, "draw"]) -> Estimate:
    """Return the value with the percentiles of its bootstrap draws; draws that are NaN are left out."""
    known = draws[np.isfinite(draws)]
    if not np.isfinite(value) or len(known) < 2:
        return Estimate(value, float("nan"), float("nan"))
    low, high = np.quantile(known, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(value, float(low), float(high))


def bootstrap(
    statistic: Callable[..., Any], counts: Sequence[int], draws: int, seed: int
) -> Float[np.ndarray, "draw *value"]:
    """Compute a statistic of positions drawn with replacement, `draws` times.

    Args:
        statistic: Takes drawn positions, one array for each of `counts`, as long as its range.
        counts: Sizes of what is drawn again: queries, subsets, seeds.
        draws: How often.
        seed: Of the random numbers.
    """
    random = np.random.default_rng(seed)
    return np.array([statistic(*(random.integers(count, size=count) for count in counts)) for _ in range(draws)])


def estimate_mean(
    values: Float[np.ndarray, "item"], draws: int, seed: int, groups: np.ndarray | None = None
) -> Estimate:
    """Return the mean of the known values with a bootstrap interval; no interval for fewer than two.

    Args:
        values: NaN where nothing is known.
        draws: Of the bootstrap.
        seed: Of the draws.
        groups: Draw whole groups again, not single values: paraphrases of one text are not independent.
    """
    known = ~np.isnan(values)
    mean = mean_of_known(values)
    _, group = np.unique((np.arange(len(values)) if groups is None else groups)[known], return_inverse=True)
    sums, counts = np.bincount(group, values[known]), np.bincount(group)
    if len(counts) < 2:
        return Estimate(mean, float("nan"), float("nan"))
    return make_interval(
        mean, bootstrap(lambda rows: sums[rows].sum() / counts[rows].sum(), [len(counts)], draws, seed)
    )


def mean_by_group(values: Float[np.ndarray, "member column"], groups: np.ndarray) -> Float[np.ndarray, "group column"]:
    """Return the mean of the rows of each group, groups in ascending order."""
    return np.stack([values[groups == group].mean(0) for group in np.unique(groups)])


def first_of_group(values: Bool[np.ndarray, "member column"], groups: np.ndarray) -> Bool[np.ndarray, "group column"]:
    """Return the first row of each group, groups in ascending order."""
    return values[np.unique(groups, return_index=True)[1]]


Value = Estimate | float | int | str | None

TEXT_WIDTH = 160


@dataclass(frozen=True)
class EvaluationRow:
    """What was found of one method."""

    method: str
    values: Mapping[str, Value]
    """By column."""
    seconds: float | None = None
    """What the scores cost; None where nothing was computed."""
    memory_bytes: int | None = None
    opponent: bool = False

    @classmethod
    def of(cls, scored: Scored, values: Mapping[str, Value]) -> "EvaluationRow":
        """Return the row of one run, with its cost."""
        return cls(scored.name, values, scored.run.run.seconds, scored.run.run.peak_memory_bytes, scored.opponent)


@dataclass(frozen=True)
class Evaluation:
    """A table of methods: `str()` and `rich` print it, `to_json()` is what the file holds."""

    kind: str
    title: str
    rows: tuple[EvaluationRow, ...]
    notes: tuple[str, ...] = ()
    """How to read it, and what is missing."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What is in the file and not in the table; JSON terms."""
    files: tuple[str, ...] = ()

    def __getitem__(self, method: str) -> EvaluationRow:
        """Return the row of a method."""
        return next(row for row in self.rows if row.method == method)

    def __str__(self) -> str:
        return as_text(self, TEXT_WIDTH)

    def __rich__(self) -> Group:
        return Group(self.title, _table(self.rows), *self.notes, *self.files)

    def to_json(self) -> dict[str, Any]:
        """Return everything in JSON terms; intervals as [low, high], unknown numbers as null."""
        return {
            "kind": self.kind,
            "title": self.title,
            "rows": [
                {
                    "method": row.method,
                    "opponent": row.opponent,
                    **{name: as_plain(value) for name, value in row.values.items()},
                    "seconds": row.seconds,
                    "memory_bytes": row.memory_bytes,
                }
                for row in self.rows
            ],
            "notes": list(self.notes),
            **{name: as_plain(value) for name, value in self.details.items()},
        }


def write_evaluation(
    result: Evaluation, folder: Path, figure: Mapping[str, bytes], report_to: Sequence[str] = ()
) -> Evaluation:
    """Write the result to its files, `KIND.json` and the figure as PDF and PNG, and report it to trackers."""
    make_folder(folder)
    files = {f"{result.kind}.json": (json.dumps(result.to_json(), indent=1) + "\n").encode(), **figure}
    for name, content in files.items():
        remove_strays_of(folder / name)
        write_durably(folder / name, [content])
    if report_to:
        from vestige.training import report_numbers  # imports torch, which a table does without

        numbers: dict[str, Any] = {}
        for row in result.rows:
            for name, value in row.values.items():
                ends = value._asdict() if isinstance(value, Estimate) else {"": value}
                numbers |= {f"{row.method}/{name}/{end}".removesuffix("/"): each for end, each in ends.items()}
        report_numbers(report_to, folder, result.kind, numbers)
    return replace(result, files=tuple(str(folder / name) for name in files))


def as_plain(value: Any) -> Any:
    """Replace NaN, which JSON has not, by null."""
    if isinstance(value, Estimate):
        return {"value": as_plain(value.value), "interval": [as_plain(value.low), as_plain(value.high)]}
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): as_plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [as_plain(each) for each in value]
    return value


def make_cells(rows: Sequence[EvaluationRow]) -> tuple[list[str], list[list[str]]]:
    """Return the heads of the columns of a table, and the cells of each row."""
    columns = list(dict.fromkeys(name for row in rows for name in row.values))
    has_memory = any(row.memory_bytes is not None for row in rows)
    cells = []
    for row in rows:
        seconds = "" if row.seconds is None else format_seconds(row.seconds)
        memory = "" if row.memory_bytes is None else format_bytes(row.memory_bytes)
        values = (format_value(row.values.get(name)) for name in columns)
        cells.append([row.method, *values, seconds, *([memory] if has_memory else [])])
    return ["method", *columns, "seconds", *(["memory"] if has_memory else [])], cells


def _table(rows: Sequence[EvaluationRow]) -> Table:
    table, (head, cells) = Table(), make_cells(rows)
    for place, name in enumerate(head):
        table.add_column(name, justify="right" if place else "left", no_wrap=True)
    opponents = [row.opponent for row in rows]
    for each, *pair in zip(cells, opponents, [*opponents[1:], False], strict=True):
        table.add_row(*each, end_section=pair == [False, True])
    return table


def format_value(value: Value) -> str:
    """Format a value for a table; empty where there is none."""
    if value is None:
        return ""
    if isinstance(value, str | int):
        return str(value)
    if isinstance(value, Estimate):
        if not value.is_known:
            return "undefined"
        known = math.isfinite(value.low)
        return (
            f"{_digits(value.value)} [{_digits(value.low)}, {_digits(value.high)}]" if known else _digits(value.value)
        )
    return _digits(value) if math.isfinite(value) else "undefined"


def _digits(value: float) -> str:
    return f"{value:.3f}" if abs(value) >= 0.01 or value == 0 else f"{value:.2g}"


def open_folder(folder: Path, identity: Mapping[str, Any], *own: str) -> None:
    """Open or begin a folder of results that all follow from `identity`, which `compared.json` in it holds.

    Raises:
        IndexMismatch: It holds results of something else; nothing was changed. The message shows the difference.
        CorruptFile: That file does not read.
        UserError: It holds other files than `own` and temporary ones.
    """
    path = folder / "compared.json"
    if not path.exists():
        require_no_others(folder, own)
        make_folder(folder)
        write_durably(path, [json.dumps(identity, indent=1).encode()])
        return
    try:
        found = differences(parse_object(path.read_bytes()), identity, {}, {})
    except ValueError as error:
        raise CorruptFile(f"{path} does not read as JSON ({error}). Give another --out.") from error
    if found:
        lines = [f"  {one.field}: {shorten(one.old, 60)} there, {shorten(one.new, 60)} now" for one in found]
        raise IndexMismatch(
            "\n".join([f"{folder} evaluated something else; nothing was changed.", *lines, "Give another --out."])
        )


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
    for number, (colour, line) in enumerate(zip(choose_colours(len(lines)), lines, strict=True)):
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
