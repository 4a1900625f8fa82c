"""The page of an audit: what is known of the examples, how well the measures find them, and which examples to read."""

import math
import re
from dataclasses import dataclass
from typing import NamedTuple, get_args

import numpy as np

from vestige.progress import format_memory
from vestige.reports._audit_panels import TRUTHS, Chart, charts_of, shown_span
from vestige.reports._canary_charts import canary_charts
from vestige.reports._header import Fact, compact, duration, short_name
from vestige.runs import CHANCE_BITS, Audit, EvidenceRow, JudgementRecord, Truth, mean_exposures

SHOWN, SHOWN_SECRETS = 25, 12
"""Examples of each list, and planted secrets."""
LONGEST_TEXT = 1200


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


class Planted(NamedTuple):
    """One planted secret under the model."""

    secret: str
    before: str
    copies: str
    exposure: str
    rank: str
    course: str
    """Exposure at every checkpoint, in their order."""


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
    planted: tuple[Planted, ...]
    planted_note: str
    rankings: tuple[Ranking, ...]
    missing: tuple[Missing, ...]
    notes: tuple[str, ...]
    versions: str
    vestige: str


def audit_page(audit: Audit) -> AuditPage:
    """Return the page of a run of `vestige audit`."""
    run = audit.run
    return AuditPage(
        title=f"What {short_name(run.model.name)} has memorized",
        subtitle=f"memorization · {short_name(run.data.name)}",
        facts=_facts(audit),
        command=tuple(re.split(r" (?=--)", run.command.strip())),
        judged=tuple(_judged(audit, truth) for truth in get_args(Truth) if audit.judgement(truth)),
        charts=tuple(chart for chart in (*canary_charts(audit), *charts_of(audit)) if chart.svg),
        planted=tuple(_planted(audit)),
        planted_note=_planted_note(audit),
        rankings=tuple(_rankings(audit)),
        missing=_missing(audit),
        notes=(*run.notes, *_layer_notes(audit)),
        versions=" · ".join(f"{name} {version}" for name, version in run.versions.items()),
        vestige=run.vestige,
    )


def shown(value: float | None) -> str:
    """Format a number as the page writes it."""
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
        facts.append(Fact(f"Given back word for word, {prefix} tokens given", shown_span(span)))
    memory = f"{format_memory(run.peak_memory_bytes, run.peak_gpu_memory_bytes)} at most"
    return (*facts, Fact("Took", duration(run.seconds), note=memory if run.peak_memory_bytes else None))


def _judged(audit: Audit, truth: Truth) -> Judged:
    last, layer = audit.checkpoints[-1], audit.run.main_layer
    rows = [each for each in audit.judgement(truth, checkpoint=last) if each.layer in (None, layer)]
    rows.sort(key=lambda each: each.measure == "blind")
    title, note = TRUTHS[truth]
    counts = f"{max(each.found for each in rows):,} among {max(each.others for each in rows):,} others"
    unresolved = any(not rate.resolved for each in rows for rate in each.tpr_at)
    return Judged(title, note, counts, tuple(map(_cells, rows)), unresolved)


def _cells(row: JudgementRecord) -> tuple[str, ...]:
    rates = [shown_span(rate.rate) + ("" if rate.resolved else " *") for rate in (*row.tpr_at, *row.fpr_at)]
    name = "blind: texts alone, no model" if row.measure == "blind" else row.measure
    name += f", {'low' if row.sign < 0 else 'high'} values flagged" if row.measure != "blind" else ""
    rule = (
        f"{row.rule}: TPR {shown_span(row.rule_tpr)}, FPR {shown_span(row.rule_fpr)}"
        if row.rule and row.rule_tpr and row.rule_fpr
        else ""
    )
    return (name, shown_span(row.auc), *rates, rule)


def _planted(audit: Audit) -> list[Planted]:
    """Return canaries by their exposure under the model, the most exposed first."""
    last = [each for each in audit.run.canaries if each.checkpoint == audit.checkpoints[-1]]
    last.sort(key=lambda each: -math.inf if each.exposure is None else each.exposure, reverse=True)
    found = []
    for each in last[:SHOWN_SECRETS]:
        course = [one.exposure for one in audit.run.canaries if (one.id, one.secret) == (each.id, each.secret)]
        rank = "–" if each.rank is None else f"{each.rank:,.4g} of {each.references + 1:,}"
        copies = "–" if each.copies is None else f"{each.copies:,}"
        bits = shown(each.exposure)
        found.append(Planted(each.secret, each.prompt, copies, bits, rank, " → ".join(map(shown, course))))
    return found


def _planted_note(audit: Audit) -> str:
    values = [
        each.exposure
        for each in audit.run.canaries
        if each.checkpoint == audit.checkpoints[-1] and each.exposure is not None
    ]
    if not values:
        return ""
    most = max(each.most for each in audit.run.canaries)
    groups = [each for each in mean_exposures(audit.run.canaries) if each.checkpoint == audit.checkpoints[-1]]
    means = f"mean exposure {np.mean(values):.2f} bits"
    if len(groups) > 1:
        by_copies = [f"{each.mean:.2f} with {_copies(each.copies)}" for each in groups]
        means = f"mean exposure in bits {', '.join(by_copies)}"
    shown_ones = f" The {SHOWN_SECRETS} most exposed:" if len(values) > SHOWN_SECRETS else ""
    return (
        f"{len(values):,} secrets, {means}; {CHANCE_BITS:.2f} is the mean of secrets that were never planted, and more "
        f"than {most:.1f} cannot be measured with this number of references.{shown_ones}"
    )


def _copies(copies: int | None) -> str:
    return "copies unknown" if copies is None else f"{copies:,} {'copy' if copies == 1 else 'copies'}"


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
