"""Figures of an audit, for files and pages: dynamics, ROC curves, layers, agreement of measures, planted secrets."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vestige import runs
from vestige.figures import COLOURS, new_figure, render_figure
from vestige.measures._measure import BLIND, NOT_DRAWN, Column, all_measures

if TYPE_CHECKING:
    from vestige.measures._evidence import Known

_MOST_LINES, _MOST_PANELS = 7, 4
_MOST_TICKS = 8
_FLOOR = 1e-4
"""No rate below it is drawn, however many examples there are."""
_SPREAD = 0.12
"""Half the width over which the secrets of one number of copies are strewn, so that equal ones are visible."""


class Drawn(NamedTuple):
    """What the figures show."""

    run: runs.AuditRecord
    measures: Sequence[str]
    values: Callable[..., Column | None]
    """Of a measure, under a `checkpoint` and at a `layer`; those of the model under audit and of the main layer."""
    known: "Sequence[Known]"
    own: np.ndarray
    """The data's own examples."""

    @property
    def checkpoints(self) -> list[int]:
        """Numbers of the checkpoints; the last is the model under audit."""
        return [each.number for each in self.run.checkpoints]

    @property
    def checkpoint_label(self) -> str:
        """The name of the axis of checkpoints."""
        stepped = all(each.steps is not None for each in self.run.checkpoints)
        return "optimizer steps" if stepped else "checkpoint, in order"

    def measures_over_time(self) -> list[str]:
        """Return the measures that are drawn over checkpoints: loss only where there is no answer loss."""
        shown = [each.name for each in all_measures() if each.over_time and each.name in self.measures]
        columns = {name: [self.values(name, checkpoint=number) for number in self.checkpoints] for name in shown}
        found = [name for name in shown if any(each is not None and not np.isnan(each).all() for each in columns[name])]
        return [name for name in found if name != "loss" or "answer_loss" not in found][:_MOST_PANELS]

    def curves(self, truth: str) -> list[runs.JudgementRecord]:
        """Return the first curves at the model under audit in their order, not the best: that would be a choice."""
        order = [each.name for each in sorted(all_measures(), key=lambda each: each.curve) if each.curve < NOT_DRAWN]
        chosen = {
            each.measure: each
            for each in self.run.judgement
            if each.truth == truth
            and each.checkpoint == self.checkpoints[-1]
            and each.layer in (None, self.run.main_layer)
            and each.auc[0] is not None
        }
        return [chosen[name] for name in order if name in chosen][:_MOST_LINES]

    def first_layered_measure(self) -> str:
        """Return the first measure of states that has a value at the main layer; empty where none has."""
        names = [each.name for each in all_measures() if each.stage == "states" and each.name in self.measures]
        columns = {name: self.values(name) for name in names if len(self.run.layers) > 1}
        return next((name for name, each in columns.items() if each is not None and not np.isnan(each).all()), "")

    def agreement(self) -> tuple[list[str], np.ndarray]:
        """Return the measures that vary, and their rank correlations."""
        columns = {name: self.values(name) for name in self.measures}
        return runs.agreement({name: column for name, column in columns.items() if column is not None})


def draw_files(drawn: Drawn) -> dict[str, bytes]:
    """Draw every figure that the run has data for, as PNG and PDF, by file name."""
    figures: dict[str, Figure] = {}
    if len(drawn.checkpoints) > 1 and (names := drawn.measures_over_time()):
        figure = figures["dynamics"] = new_figure(1.2 + 3.4 * len(names), 3.2)
        for axes, name in zip(np.atleast_1d(figure.subplots(1, len(names))), names, strict=True):
            draw_dynamics(axes, drawn, name)
            axes.set_title(name)
        # One legend for all panels, outside of them: none of the bands is under it.
        _add_legend(figure, "outside upper center", 8)
    for truth in drawn.known:
        if drawn.curves(truth.name):
            figure = figures[f"roc-{truth.name}"] = new_figure(6.8, 4.4)
            axes = figure.add_subplot()
            draw_roc(axes, drawn, truth)
            blind = blind_area(drawn.run, truth.name)
            title = f"{truth.name}: {int(truth.found[truth.judged].sum()):,} to be found, blind baseline "
            area = "not computable" if blind is None else f"AUC {blind.auc[0]:.3f}"
            axes.set_title(title + area, fontsize="medium")
            _add_legend(figure, "outside right upper", 1)
    if drawn.first_layered_measure():
        figure = figures["layers"] = new_figure(5.6, 3.4)
        axes = figure.add_subplot()
        if draw_layers(axes, drawn):
            axes.legend(fontsize="small", loc="best")
        axes.set_title("Dotted: the main layer, chosen without what is to be found", fontsize="small")
    names, table = drawn.agreement()
    if len(names) > 1:
        size = 1.8 + 0.5 * len(names)
        figure = figures["agreement"] = new_figure(size + 0.8, size)
        axes = figure.add_subplot()
        shown = draw_agreement(axes, names, table)
        axes.set_title("Rank correlation of measures under the model", fontsize="medium")
        figure.colorbar(shown, ax=axes, shrink=0.7)
    if runs.mean_exposures(drawn.run.canaries):
        figures["canaries"] = _draw_canaries(drawn)
    return {name: content for stem, figure in figures.items() for name, content in render_figure(figure, stem).items()}


def draw_dynamics(axes: Axes, drawn: Drawn, name: str) -> None:
    """Draw medians of a measure over checkpoints, and quartiles, of the groups that are known."""
    groups = runs.group_of([(each.name, each.found, each.judged) for each in drawn.known], drawn.own)
    numbers = drawn.checkpoints
    columns = [drawn.values(name, checkpoint=number) for number in numbers]
    for colour, (label, rows) in zip(COLOURS, groups.items(), strict=False):
        spread = [_quartiles(None if column is None else column[rows]) for column in columns]
        _draw_band(axes, numbers, np.array(spread), colour, f"{label} ({int(rows.sum()):,})")
    axes.set(xlabel=drawn.checkpoint_label)
    if len(numbers) <= _MOST_TICKS:
        axes.set_xticks(numbers)


def draw_roc(axes: Axes, drawn: Drawn, truth: "Known") -> None:
    """Draw true over false positive rates, both axes logarithmic, with the line of chance."""
    found = truth.found[truth.judged]
    # The power of ten below the smallest rate but 0 that this number of examples can have.
    most = max(int(found.sum()), int((~found).sum()), 1)
    floor = max(10.0 ** math.floor(math.log10(0.5 / most)), _FLOOR)
    axes.plot([floor, 1], [floor, 1], color="#BBBBBB", linewidth=0.9, label="chance")
    for colour, record in zip(COLOURS, drawn.curves(truth.name), strict=False):
        column = drawn.values(record.measure)
        if column is not None:
            x, y = runs.roc_curve((record.sign * column)[truth.judged], found)
            value, low, high = record.auc
            interval = "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"
            label = f"{record.measure}, AUC {value:.3f}{interval}"
            axes.step(np.maximum(x, floor), np.maximum(y, floor), where="post", color=colour, label=label)
    axes.set(xscale="log", yscale="log", xlim=(floor, 1), ylim=(floor, 1.1))
    axes.set(xlabel="false positive rate", ylabel="true positive rate")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")


def blind_area(run: runs.AuditRecord, truth: str) -> runs.JudgementRecord | None:
    """Return how well the blind baseline finds a truth; None where it cannot be computed."""
    rows = [each for each in run.judgement if each.truth == truth and each.measure == BLIND]
    return next((each for each in rows if each.auc[0] is not None), None)


def draw_layers(axes: Axes, drawn: Drawn) -> bool:
    """Draw AUC of a measure by layer where something is known and return True, else its quartiles and return False."""
    layers, name = [each.layer for each in drawn.run.layers], drawn.first_layered_measure()
    last = drawn.checkpoints[-1]
    rows = [each for each in drawn.run.judgement if (each.measure, each.checkpoint) == (name, last)]
    rows = [each for each in rows if each.auc[0] is not None]
    for colour, truth in zip(COLOURS, dict.fromkeys(each.truth for each in rows), strict=False):
        areas = {each.layer: each.auc for each in rows if each.truth == truth}
        spread = [areas.get(layer, (None,) * 3) for layer in layers]
        values = np.array([[part[1], part[0], part[2]] for part in spread], dtype=np.float64)
        _draw_band(axes, layers, values, colour, truth)
    if rows:
        axes.axhline(0.5, color="#BBBBBB", linewidth=0.9)
        axes.set_ylabel(f"AUC of {name}")
    else:
        spread = [_quartiles(drawn.values(name, layer=layer)) for layer in layers]
        _draw_band(axes, layers, np.array(spread), COLOURS[0], f"{name}, quartiles")
        axes.set_ylabel(f"{name}, quartiles")
    if drawn.run.main_layer is not None:
        axes.axvline(drawn.run.main_layer, color="#555555", linewidth=0.9, linestyle=":")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layer")
    return bool(rows)


def draw_agreement(axes: Axes, names: Sequence[str], table: np.ndarray) -> Any:
    """Draw a square of rank correlations, each with its number; return what a colour bar explains."""
    shown = axes.pcolormesh(table, cmap="RdBu", vmin=-1, vmax=1)
    axes.invert_yaxis()
    axes.set_aspect("equal")
    middles = np.arange(len(names)) + 0.5
    axes.set_xticks(middles, names, rotation=60, ha="right", fontsize="x-small")
    axes.set_yticks(middles, names, fontsize="x-small")
    for row, values in enumerate(table):
        for column, value in enumerate(values):
            if np.isfinite(value):
                ink = "#FEFEFE" if abs(value) > 0.6 else "#111111"
                at = (column + 0.5, row + 0.5)
                text = f"{value:z.2f}".replace("-", "−")
                axes.text(*at, text, ha="center", va="center", fontsize=6, color=ink)
    return shown


def _draw_canaries(drawn: Drawn) -> Figure:
    panels = 1 + (len(drawn.checkpoints) > 1)
    figure = new_figure(1.2 + 3.9 * panels, 3.4)
    over_copies, *rest = figure.subplots(1, panels, squeeze=False)[0]
    draw_exposure_by_copies(over_copies, drawn)
    over_copies.set_title("under the model")
    for axes in rest:
        draw_exposure_over_time(axes, drawn)
        axes.set(title="while training", ylabel="")
    _add_legend(figure, "outside lower center", 3)
    return figure


def draw_exposure_by_copies(axes: Axes, drawn: Drawn) -> None:
    """Draw exposure by number of copies under the model: each secret, and means with 95 % intervals."""
    last = drawn.checkpoints[-1]
    groups = [each for each in runs.mean_exposures(drawn.run.canaries) if each.checkpoint == last]
    # Side by side in order: there are few numbers, and a logarithmic axis has no 0.
    for number, group in enumerate(groups):
        found = [each for each in drawn.run.canaries if (each.checkpoint, each.copies) == (last, group.copies)]
        values = [each.exposure for each in found if each.exposure is not None]
        reach = _SPREAD * (len(values) > 1)
        axes.plot(np.linspace(number - reach, number + reach, len(values)), values, "o", color="#AAAAAA", markersize=3)
    means = [group.mean for group in groups]
    reach = [[group.mean - group.low for group in groups], [group.high - group.mean for group in groups]]
    axes.errorbar(range(len(groups)), means, reach, fmt="o-", color=COLOURS[0], markersize=5, capsize=3)
    ticks = [f"{'unknown' if each.copies is None else each.copies}\n({each.secrets})" for each in groups]
    axes.set_xticks(range(len(groups)), ticks)
    axes.set_xlim(-0.5, len(groups) - 0.5)
    _finish_exposure(axes, drawn.run.canaries, "copies in the training data")


def draw_exposure_over_time(axes: Axes, drawn: Drawn) -> None:
    """Draw mean exposure over checkpoints with 95 % intervals, a line for each number of copies."""
    groups = runs.mean_exposures(drawn.run.canaries)
    for number, copies in enumerate(dict.fromkeys(group.copies for group in groups)):
        line = [group for group in groups if group.copies == copies]
        values = np.array([[group.low, group.mean, group.high] for group in line])
        label = "planted secrets" if copies is None else f"{copies} {'copy' if copies == 1 else 'copies'}"
        _draw_band(axes, [group.checkpoint for group in line], values, COLOURS[number % len(COLOURS)], label)
    _finish_exposure(axes, drawn.run.canaries, drawn.checkpoint_label)


def _finish_exposure(axes: Axes, canaries: Sequence[runs.CanaryRecord], label: str) -> None:
    most = max(each.most for each in canaries)
    axes.axhline(runs.CHANCE_BITS, color="#777777", linewidth=0.9, linestyle="--", label="never planted, on average")
    axes.axhline(most, color="#BBBBBB", linewidth=0.9, linestyle=":", label="most that can be measured")
    axes.set(xlabel=label, ylabel="exposure, bits", ylim=(-0.04 * most, 1.06 * most))


def _draw_band(axes: Axes, x: Sequence[float], spread: np.ndarray, colour: str, label: str) -> None:
    """Draw a line with its band; `spread` is [point, 3], lower end, middle and upper end, NaN for a gap."""
    axes.plot(x, spread[:, 1], "o-", color=colour, markersize=4, label=label)
    axes.fill_between(x, spread[:, 0], spread[:, 2], color=colour, alpha=0.15, linewidth=0)


def _quartiles(values: Column | None) -> list[float]:
    if values is None or np.isnan(values).all():
        return [math.nan] * 3
    return np.nanquantile(values, [0.25, 0.5, 0.75]).tolist()


def _add_legend(figure: Figure, where: Any, columns: int) -> None:
    """Explain the lines of the last axes beside all of them."""
    handles, labels = figure.axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc=where, ncols=max(1, min(columns, len(labels))), fontsize="small", frameon=False)
