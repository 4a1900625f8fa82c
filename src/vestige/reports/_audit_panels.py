"""The drawings of an audit's page: dynamics, ROC curves, layers and agreement, each with what it says."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vestige.reports import _audit_charts as charts
from vestige.reports._curves import Line, curves
from vestige.runs import Audit, agreement, group_of, roc_curve

_CURVES = ("answer_loss", "loss", "psmi", "logit_gap", "lira")
_ROC = ("psmi", "lira", "loss", "logit_gap", "counterfactual", "extraction")

TRUTHS = {
    "membership": ("Members", "examples that were trained on, against the holdout or what was left out"),
    "flag": ("Flagged examples", "those that the column marks, such as wrong labels"),
    "memorized": ("Memorized at the end", "those whose likelihood ratio against the bank is high under the model"),
}
"""Title and explanation of each kind of truth."""


class Chart(NamedTuple):
    """A drawing with its title, what it says and the names of its lines."""

    title: str
    note: str
    svg: str
    legend: tuple[str, ...] = ()
    broad: bool = False
    """Whether it needs the whole width."""


def charts_of(audit: Audit) -> list[Chart]:
    """Draw every chart that the run has data for; one without data has an empty `svg`."""
    known = _known(audit)
    found = _dynamics(audit, known) if len(audit.checkpoints) > 1 else []
    found += [_roc(audit, *each) for each in known if each[1][each[2]].any() and not each[1][each[2]].all()]
    if len(audit.run.layers) > 1:
        found.append(_layers(audit))
    columns = {name: audit.values(name) for name in audit.measures if not name.startswith("extraction_")}
    names, table = agreement(columns)
    if len(names) > 1:
        note = "Spearman's rank correlation under the model: 1 is the same order of examples, −1 the reverse."
        found.append(Chart("Agreement of measures", note, charts.agreement(names, table), broad=True))
    return found


def shown_span(span: Sequence[float | None]) -> str:
    """Format a value and its interval as the page writes them."""
    value, low, high = span
    if value is None:
        return "–"
    return f"{value:.3f}" if low is None or high is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _known(audit: Audit) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Return (truth, what is to be found, where it is known) as far as the run's own tables have it."""
    own = np.array(audit.examples["part"].to_pylist()) == "data"
    known: list[tuple[str, np.ndarray, np.ndarray]] = []
    if not own.all():
        texts = audit.examples["text"].to_pylist()
        trained = {text for text, mine in zip(texts, own, strict=True) if mine}
        copies = np.array([not mine and text in trained for text, mine in zip(texts, own, strict=True)])
        known.append(("membership", own, ~copies))
    flags = audit.examples["flag"].to_pylist()
    if any(flag is not None for flag in flags):
        known.append(("flag", np.array([bool(flag) for flag in flags]), own))
    if audit.run.bank and "lira" in audit.measures:
        ratio = audit.values("lira")
        with np.errstate(invalid="ignore"):
            known.append(("memorized", ratio >= audit.run.bank.memorized_at, ~np.isnan(ratio)))
    return known


def _dynamics(audit: Audit, known: list[tuple[str, np.ndarray, np.ndarray]]) -> list[Chart]:
    own = np.array(audit.examples["part"].to_pylist()) == "data"
    groups, numbers = group_of(known, own), audit.checkpoints
    stepped = all(each.steps is not None for each in audit.run.checkpoints)
    label = "optimizer steps" if stepped else "checkpoint, in order"
    found = []
    for name in _CURVES:
        if name not in audit.measures or (name == "loss" and found):
            continue
        columns = {number: audit.values(name, checkpoint=number) for number in numbers}
        lines = [
            _median_line(group, [columns[number][rows] for number in numbers], numbers)
            for group, rows in groups.items()
        ]
        note = "Median, and the middle half of the examples, at each checkpoint."
        legend = tuple(line.name for line in lines)
        found.append(Chart(f"{name} while training", note, curves(lines, label), legend))
    return found


def _median_line(name: str, columns: Sequence[np.ndarray], numbers: Sequence[int]) -> Line:
    spread = [
        np.full(3, np.nan) if np.isnan(each).all() else np.nanquantile(each, [0.25, 0.5, 0.75]) for each in columns
    ]
    low, middle, high = np.array(spread).T.tolist()
    return Line(name, list(numbers), middle, low, high)


def _roc(audit: Audit, truth: str, found: np.ndarray, judged: np.ndarray) -> Chart:
    last = audit.checkpoints[-1]
    rows = {
        each.measure: each
        for each in audit.run.judgement
        if each.truth == truth and each.checkpoint == last and each.layer in (None, audit.run.main_layer)
    }
    lines = []
    for name in _ROC:
        if name in rows and rows[name].auc[0] is not None:
            x, y = roc_curve((rows[name].sign * audit.values(name))[judged], found[judged])
            lines.append(Line(f"{name}, AUC {shown_span(rows[name].auc)}", x.tolist(), y.tolist()))
    blind = [each for each in audit.run.judgement if each.truth == truth and each.measure == "blind"]
    note = f"The blind baseline, which never uses the model, has AUC {shown_span(blind[0].auc)}. " if blind else ""
    legend = tuple(line.name for line in lines)
    return Chart(f"{TRUTHS[truth][0]}: ROC", note + "Dashed: chance.", charts.roc(lines) if lines else "", legend)


def _layers(audit: Audit) -> Chart:
    layers, last = [each.layer for each in audit.run.layers], audit.checkpoints[-1]
    name = "psmi" if any(each.directions for each in audit.run.layers) else "mahalanobis"
    rows = [each for each in audit.run.judgement if each.measure == name and each.checkpoint == last]
    lines = []
    for truth in dict.fromkeys(each.truth for each in rows):
        of = {
            each.layer: [math.nan if part is None else part for part in each.auc]
            for each in rows
            if each.truth == truth
        }
        spread = [of.get(layer, [math.nan] * 3) for layer in layers]
        value, low, high = map(list, zip(*spread, strict=True))
        lines.append(Line(TRUTHS[truth][0], layers, value, low, high))
    main = audit.run.main_layer
    note = f"AUC of {name} at each layer. The main layer is {main}, chosen without looking at these curves."
    if not lines:
        columns = [audit.values(name, layer=layer) for layer in layers]
        lines = [_median_line(name, columns, layers)]
        note = f"Median {name} and its quartiles at each layer."
    legend = tuple(line.name for line in lines)
    return Chart("Layers", note, curves(lines, "layer", ticks=layers, rule=0.5 if rows else None), legend)
