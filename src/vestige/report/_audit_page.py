"""The page of an audit: what is known of the examples, how well the measures tell, and where to look."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, get_args

import numpy as np

from vestige.report import _audit_charts as charts
from vestige.report._header import Fact, compact, duration, short_name
from vestige.runs import Audit, EvidenceRow, JudgementRecord, Truth
from vestige.runs._audit_curves import agreement, group_of, roc_curve

SHOWN = 25
"""Examples of each list."""
LONGEST_TEXT = 1200
_CURVES = ("answer_loss", "loss", "psmi", "logit_gap", "lira")
_ROC = ("psmi", "lira", "loss", "logit_gap", "counterfactual", "extraction")
TRUTHS = {
    "membership": ("Members", "examples that were trained on, against the holdout or what was left out"),
    "flag": ("Flagged examples", "those that the column marks, such as wrong labels"),
    "memorized": ("Memorized at the end", "those whose likelihood ratio against the bank is high under the model"),
}


class Chart(NamedTuple):
    """A drawing with its title, what it says and the names of its lines."""

    title: str
    note: str
    svg: str
    legend: tuple[str, ...] = ()
    broad: bool = False
    """Whether it needs the whole width."""


class Judged(NamedTuple):
    """The table of one kind of truth."""

    title: str
    note: str
    counts: str
    rows: tuple[tuple[str, ...], ...]
    unresolved: bool


class Ranking(NamedTuple):
    """Examples in the order of one measure."""

    measure: str
    order: str
    meaning: str
    rows: tuple["Listed", ...]


class Listed(NamedTuple):
    """One example of a ranking."""

    rank: int
    id: str
    value: str
    text: str
    facts: tuple[str, ...]
    others: tuple[tuple[str, str], ...]


class Missing(NamedTuple):
    """A measure that some examples lack."""

    measure: str
    known: str
    reason: str


@dataclass(frozen=True)
class AuditPage:
    """Everything on the page."""

    title: str
    subtitle: str
    facts: tuple[Fact, ...]
    command: tuple[str, ...]
    judged: tuple[Judged, ...]
    charts: tuple[Chart, ...]
    rankings: tuple[Ranking, ...]
    missing: tuple[Missing, ...]
    notes: tuple[str, ...]
    versions: str
    vestige: str


def audit_page(audit: Audit) -> AuditPage:
    """The page of a run of `vestige audit`."""
    run = audit.run
    return AuditPage(
        title=f"What {short_name(run.model.name)} knows by heart",
        subtitle=f"memorization · {short_name(run.data.name)}",
        facts=_facts(audit),
        command=tuple(re.split(r" (?=--)", run.command.strip())),
        judged=tuple(_judged(audit, truth) for truth in get_args(Truth) if audit.judgement(truth)),
        charts=tuple(chart for chart in _charts(audit) if chart.svg),
        rankings=tuple(_rankings(audit)),
        missing=_missing(audit),
        notes=(*run.notes, *_layer_notes(audit)),
        versions=" · ".join(f"{name} {version}" for name, version in run.versions.items()),
        vestige=run.vestige,
    )


def shown(value: float | None) -> str:
    """A number as the page writes it."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.4g}".replace("-", "−")


def _facts(audit: Audit) -> tuple[Fact, ...]:
    run = audit.run
    facts = [
        Fact(
            "Model",
            short_name(run.model.name),
            run.model.fingerprint[:8],
            f"{compact(run.model.parameters)} parameters",
        ),
        Fact("Examples", short_name(run.data.name), run.data.fingerprint[:8], compact(run.data.examples)),
    ]
    if run.holdout:
        facts.append(Fact("Held out", short_name(run.holdout.name), note=compact(run.holdout.examples)))
    if run.bank:
        note = f"{run.bank.models} models, by {run.bank.value}"
        facts.append(Fact("Bank", short_name(run.bank.name), run.bank.id[:8] or None, note))
        counted = f"{run.bank.memorized} of {compact(run.data.examples)}"
        facts.append(Fact(f"Likelihood ratio {run.bank.memorized_at:g} or more", counted))
    if len(run.checkpoints) > 1:
        note = None if run.trigger is None else f"median loss below 5 % of its start from {run.trigger} on"
        facts.append(Fact("Checkpoints", str(len(run.checkpoints)), note=note))
    if run.classes:
        facts.append(Fact("Classes", str(len(run.classes)), note=", ".join(run.classes[:6])))
    for prefix, span in run.extraction.items():
        facts.append(Fact(f"Given back word for word, {prefix} tokens given", _span(span)))
    memory = f"{run.peak_memory_bytes / 2**30:.1f} GiB at most" if run.peak_memory_bytes else None
    return (*facts, Fact("Took", duration(run.seconds), note=memory))


def _judged(audit: Audit, truth: Truth) -> Judged:
    last, layer = audit.checkpoints[-1], audit.run.main_layer
    rows = [each for each in audit.judgement(truth, checkpoint=last) if each.layer in (None, layer)]
    rows.sort(key=lambda each: each.measure == "blind")
    title, note = TRUTHS[truth]
    counts = f"{max(each.found for each in rows):,} among {max(each.others for each in rows):,} others"
    unresolved = any(not rate.resolved for each in rows for rate in each.tpr_at)
    return Judged(title, note, counts, tuple(map(_cells, rows)), unresolved)


def _cells(row: JudgementRecord) -> tuple[str, ...]:
    rates = [_span(rate.rate) + ("" if rate.resolved else " *") for rate in (*row.tpr_at, *row.fpr_at)]
    name = "blind: texts alone, no model" if row.measure == "blind" else row.measure
    name += f", {'low' if row.sign < 0 else 'high'} values flagged" if row.measure != "blind" else ""
    rule = (
        f"{row.rule}: TPR {_span(row.rule_tpr)}, FPR {_span(row.rule_fpr)}"
        if row.rule and row.rule_tpr and row.rule_fpr
        else ""
    )
    return (name, _span(row.auc), *rates, rule)


def _span(span: Sequence[float | None]) -> str:
    value, low, high = span
    if value is None:
        return "–"
    return f"{value:.3f}" if low is None or high is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _known(audit: Audit) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """(truth, what is to be found, where it is known) as far as the run's own tables tell."""
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


def _charts(audit: Audit) -> list[Chart]:
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
        found.append(Chart(f"{name} while training", note, charts.curves(lines, label), legend))
    return found


def _median_line(name: str, columns: Sequence[np.ndarray], numbers: Sequence[int]) -> charts.Line:
    spread = [
        np.full(3, np.nan) if np.isnan(each).all() else np.nanquantile(each, [0.25, 0.5, 0.75]) for each in columns
    ]
    low, middle, high = np.array(spread).T.tolist()
    return charts.Line(name, list(numbers), middle, low, high)


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
            lines.append(charts.Line(f"{name}, AUC {_span(rows[name].auc)}", x.tolist(), y.tolist()))
    blind = [each for each in audit.run.judgement if each.truth == truth and each.measure == "blind"]
    note = f"The blind baseline, which never sees the model, has AUC {_span(blind[0].auc)}. " if blind else ""
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
        lines.append(charts.Line(TRUTHS[truth][0], layers, *map(list, zip(*spread, strict=True))))
    main = audit.run.main_layer
    note = f"AUC of {name} at each layer. The main layer is {main}, chosen without looking at these curves."
    if not lines:
        columns = [audit.values(name, layer=layer) for layer in layers]
        lines = [_median_line(name, columns, layers)]
        note = f"Median {name} and its quartiles at each layer."
    legend = tuple(line.name for line in lines)
    return Chart("Layers", note, charts.curves(lines, "layer", ticks=layers, rule=0.5 if rows else None), legend)


def _rankings(audit: Audit) -> list[Ranking]:
    found = []
    for name in sorted(audit.measures, key=lambda each: each != _preferred(audit)):
        record = audit.run.measures[name]
        listed = audit.top(SHOWN, name)
        if not len(listed):
            continue
        order = "lowest first" if audit.lowest_first(name) else "highest first"
        meaning = record.meaning + (f"; high: {record.high}" if record.high else "")
        found.append(Ranking(name, order, meaning, tuple(_listed(audit, row, name) for row in listed)))
    return found


def _preferred(audit: Audit) -> str:
    return audit.preferred if audit.measures else ""


def _listed(audit: Audit, row: EvidenceRow, measure: str) -> Listed:
    described = audit.examples.slice(row.row, 1).to_pylist()[0]
    named = (("class", "class"), ("label", "label"), ("source", "source"))
    facts = [f"{words} {described[name]}" for name, words in named if described[name] is not None]
    facts += ["flagged"] if described["flag"] else []
    text = row.text if len(row.text) <= LONGEST_TEXT else row.text[:LONGEST_TEXT] + " …"
    others = tuple((name, shown(value)) for name, value in row.evidence.items() if name != measure)
    return Listed(row.rank, row.example_id, shown(row.value), text, tuple(facts), others)


def _missing(audit: Audit) -> tuple[Missing, ...]:
    total = audit.run.data.examples + (audit.run.holdout.examples if audit.run.holdout else 0)
    return tuple(
        Missing(name, "none" if each.missing >= total else f"{total - each.missing:,} of {total:,}", each.reason)
        for name, each in audit.run.measures.items()
        if each.reason
    )


def _layer_notes(audit: Audit) -> list[str]:
    loose = [each.layer for each in audit.run.layers if each.converged is False]
    more = "PSMI had not settled after as many directions as it may take, at layers " + ", ".join(map(str, loose))
    return [f"{more}: its lowest values still move by more than 5 %."] if loose else []
