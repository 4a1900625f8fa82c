"""Figures of an audit: dynamics, ROC curves on logarithmic axes, layers, agreement of measures."""

import math
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vestige.measures._assembled import Evidence
from vestige.measures._judge import BLIND, Known
from vestige.measures._registry import NOT_DRAWN, Measure
from vestige.runs import JudgementRecord, agreement, group_of, roc_curve

# Okabe and Ito's colours, which colour-blind readers can distinguish.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A5A2B", "#7A4FBF")
_DOTS = 160
_MOST_LINES, _MOST_PANELS = 7, 4
_MOST_TICKS = 8
_FLOOR = 1e-4
"""No rate below it is drawn, however many examples there are."""


def figures(evidence: Evidence, known: Sequence[Known], judged: Sequence[JudgementRecord]) -> dict[str, bytes]:
    """Draw every figure that the run has data for, as PNG and PDF, by file name."""
    found: dict[str, bytes] = {}
    if len(evidence.seen) > 1:
        found |= saved("dynamics", _dynamics(evidence, known))
    for truth in known:
        best = _best(evidence.job.measures, judged, truth.name)
        if best:
            found |= saved(f"roc-{truth.name}", _roc(evidence, truth, best, judged))
    if len(evidence.job.layers) > 1 and _of_layers(evidence):
        found |= saved("layers", _layers(evidence, judged))
    names, table = agreement(
        {each.name: column for each in evidence.job.measures if (column := evidence.column(each.name)) is not None}
    )
    if len(names) > 1:
        found |= saved("agreement", _agreement(names, table))
    return found


def _dynamics(evidence: Evidence, known: Sequence[Known]) -> Figure:
    """Draw medians over checkpoints, and quartiles, of the groups that are known."""
    shown = [each.name for each in evidence.job.measures if each.over_time]
    names = [name for name in shown if _somewhere(evidence, name)][:_MOST_PANELS]
    if "answer_loss" in names and "loss" in names:
        names.remove("loss")
    figure = Figure(figsize=(1.2 + 3.4 * max(len(names), 1), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    groups = group_of([(truth.name, truth.found, truth.judged) for truth in known], ~evidence.job.held_out)
    places = [subject.number for subject in evidence.job.subjects]
    panels = np.atleast_1d(figure.subplots(1, max(len(names), 1)))
    for axes, name in zip(panels, names, strict=False):
        for colour, (label, rows) in zip(COLOURS, groups.items(), strict=False):
            spread = np.full((3, len(places)), np.nan)
            for place in range(len(places)):
                column = evidence.column(name, place)
                values = np.array([]) if column is None else column[rows]
                if (~np.isnan(values)).any():
                    spread[:, place] = np.nanquantile(values, [0.25, 0.5, 0.75])
            axes.plot(places, spread[1], "o-", color=colour, markersize=4, label=f"{label} ({int(rows.sum()):,})")
            axes.fill_between(places, spread[0], spread[2], color=colour, alpha=0.15, linewidth=0)
        axes.set(xlabel=_checkpoint_label(evidence), title=name)
        if len(places) <= _MOST_TICKS:
            axes.set_xticks(places)
    # One legend for all panels, outside of them: none of the bands is under it.
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels) or 1, fontsize="small", frameon=False)
    return figure


def _roc(
    evidence: Evidence, truth: Known, best: Sequence[JudgementRecord], judged: Sequence[JudgementRecord]
) -> Figure:
    figure = Figure(figsize=(6.8, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    floor = _floor(truth)
    axes.plot([floor, 1], [floor, 1], color="#BBBBBB", linewidth=0.9, label="chance")
    places = {subject.number: place for place, subject in enumerate(evidence.job.subjects)}
    for colour, record in zip(COLOURS, best, strict=False):
        assert record.checkpoint is not None
        column = evidence.column(record.measure, places[record.checkpoint], record.layer)
        if column is None:
            continue
        x, y = roc_curve((record.sign * column)[truth.judged], truth.found[truth.judged])
        label = f"{record.measure} (AUC {record.auc[0]:.3f})"
        axes.step(np.maximum(x, floor), np.maximum(y, floor), where="post", color=colour, label=label)
    blind = [each for each in judged if each.truth == truth.name and each.measure == BLIND and each.auc[0] is not None]
    title = f"{truth.name}: {int(truth.found[truth.judged].sum()):,} to be found, blind baseline "
    axes.set_title(title + (f"AUC {blind[0].auc[0]:.3f}" if blind else "not computable"), fontsize="medium")
    axes.set(xscale="log", yscale="log", xlim=(floor, 1), ylim=(floor, 1.1))
    axes.set(xlabel="false positive rate", ylabel="true positive rate")
    figure.legend(fontsize="small", loc="outside right upper", frameon=False)
    return figure


def _floor(truth: Known) -> float:
    """Return the power of ten below the smallest rate but 0 that this number of examples can have."""
    found = truth.found[truth.judged]
    most = max(int(found.sum()), int((~found).sum()), 1)
    return max(10.0 ** math.floor(math.log10(0.5 / most)), _FLOOR)


def _best(measures: Iterable[Measure], judged: Sequence[JudgementRecord], truth: str) -> list[JudgementRecord]:
    """Return the first curves at the model under audit in their order, not the best: that would be a choice."""
    rows = [each for each in judged if each.truth == truth and each.measure != BLIND and each.auc[0] is not None]
    if not rows:
        return []
    last = rows[-1].checkpoint
    order = [each.name for each in sorted(measures, key=lambda each: each.curve) if each.curve < NOT_DRAWN]
    chosen: dict[str, JudgementRecord] = {}
    for each in rows:
        if each.checkpoint == last and each.measure in order:
            chosen[each.measure] = each
    return [chosen[name] for name in order if name in chosen][:_MOST_LINES]


def _layers(evidence: Evidence, judged: Sequence[JudgementRecord]) -> Figure:
    """Draw AUC of a measure by layer where something is known, else its quartiles."""
    figure = Figure(figsize=(5.6, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    layers = list(evidence.job.layers)
    name = _of_layers(evidence)
    last = evidence.job.main.number
    rows = [each for each in judged if each.measure == name and each.checkpoint == last and each.auc[0] is not None]
    for colour, truth in zip(COLOURS, dict.fromkeys(each.truth for each in rows), strict=False):
        of = {each.layer: each.auc for each in rows if each.truth == truth}
        values = np.array([of.get(layer, (np.nan,) * 3) for layer in layers], dtype=np.float64)
        axes.plot(layers, values[:, 0], "o-", color=colour, markersize=4, label=f"{truth}")
        axes.fill_between(layers, values[:, 1], values[:, 2], color=colour, alpha=0.15, linewidth=0)
    if rows:
        axes.axhline(0.5, color="#BBBBBB", linewidth=0.9)
        axes.set_ylabel(f"AUC of {name}")
        axes.legend(fontsize="small", loc="best")
    else:
        columns = [evidence.column(name, -1, layer) for layer in layers]
        spread = np.array(
            [np.nanquantile(each, [0.25, 0.5, 0.75]) if each is not None else [np.nan] * 3 for each in columns]
        )
        axes.plot(layers, spread[:, 1], "o-", color=COLOURS[0], markersize=4)
        axes.fill_between(layers, spread[:, 0], spread[:, 2], color=COLOURS[0], alpha=0.15, linewidth=0)
        axes.set_ylabel(f"{name}, quartiles")
    if evidence.main_layer is not None:
        axes.axvline(evidence.main_layer, color="#555555", linewidth=0.9, linestyle=":")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layer")
    axes.set_title("Dotted: the main layer, chosen without what is to be found", fontsize="small")
    return figure


def _of_layers(evidence: Evidence) -> str:
    """Return the first measure of states that has a value at the main layer; empty where none has."""
    columns = {each.name: evidence.column(each.name) for each in evidence.job.at("states")}
    return next((name for name, values in columns.items() if values is not None and not np.isnan(values).all()), "")


def _agreement(names: Sequence[str], table: np.ndarray) -> Figure:
    size = 1.8 + 0.5 * len(names)
    figure = Figure(figsize=(size + 0.8, size), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shown = axes.imshow(table, cmap="RdBu", vmin=-1, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize="x-small")
    axes.set_yticks(range(len(names)), names, fontsize="x-small")
    for row, values in enumerate(table):
        for column, value in enumerate(values):
            if np.isfinite(value):
                ink = "white" if abs(value) > 0.6 else "black"
                axes.text(column, row, f"{value:z.2f}", ha="center", va="center", fontsize=6, color=ink)
    axes.set_title("Rank correlation of measures under the model", fontsize="medium")
    figure.colorbar(shown, ax=axes, shrink=0.7)
    return figure


def _somewhere(evidence: Evidence, name: str) -> bool:
    columns = [evidence.column(name, place) for place in range(len(evidence.seen))]
    return any(column is not None and not np.isnan(column).all() for column in columns)


def _checkpoint_label(evidence: Evidence) -> str:
    known = all(subject.steps is not None for subject in evidence.job.subjects)
    return "optimizer steps" if known else "checkpoint, in order"


def saved(name: str, figure: Figure) -> Mapping[str, bytes]:
    """Return the figure as PNG and PDF, by file name; the same bytes for the same figure."""
    found = {}
    options: dict[str, Any] = {"png": {"metadata": {"Software": None}}, "pdf": {"metadata": {"CreationDate": None}}}
    for kind, more in options.items():
        content = BytesIO()
        figure.savefig(content, format=kind, dpi=_DOTS, **more)
        found[f"{name}.{kind}"] = content.getvalue()
    return found
