"""How well the measures of a run find the known examples, and how well a classifier of texts alone finds them."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from vestige.data import describe_copies
from vestige.errors import DataError
from vestige.measures._assembled import Column, Evidence, bank_places
from vestige.measures._attack import Attack, Interval, Rate, attack, share
from vestige.measures._blind import blind_attack
from vestige.measures._job import AuditJob
from vestige.measures._registry import Measure
from vestige.runs import JudgementRecord, RateRecord, Span, Truth

BLIND = "blind"


class Known(NamedTuple):
    """What is to be found, and where that is known."""

    name: Truth
    found: Bool[np.ndarray, "example"]
    judged: Bool[np.ndarray, "example"]


def truths(evidence: Evidence) -> list[Known]:
    """Return what is known: members if there are others, flagged examples, those that a bank shows to be memorized."""
    job, settings = evidence.job, evidence.job.settings
    own = ~job.held_out
    known: list[Known] = []
    if job.held_out.any():
        known.append(Known("membership", own, ~_held_copies(job)))
    elif job.bank is not None and settings.bank_subset is not None:
        places = bank_places(job, job.bank)
        trained = job.bank.membership[job.bank.subsets == settings.bank_subset]
        if len(trained):
            known.append(Known("membership", np.where(places >= 0, trained[0][places], False), places >= 0))
    if job.flagged is not None:
        known.append(Known("flag", job.flagged, own))
    ratio = evidence.last.measures.get("lira")
    if ratio is not None and not np.isnan(ratio).all():
        with np.errstate(invalid="ignore"):
            known.append(Known("memorized", ratio >= settings.memorized_at, ~np.isnan(ratio)))
    return [_once(each, job.groups) for each in known]


def _held_copies(job: AuditJob) -> Bool[np.ndarray, "example"]:
    """Return which held-out texts are in the data too."""
    own = {text for text, held in zip(job.texts, job.held_out, strict=True) if not held}
    return np.array([held and text in own for text, held in zip(job.texts, job.held_out, strict=True)])


def _once(known: Known, groups: Int[np.ndarray, "example"]) -> Known:
    """Judge each text once, by the first of its rows; it is positive if one of its copies is."""
    found = np.bincount(groups, weights=known.found & known.judged)[groups] > 0
    rows = np.flatnonzero(known.judged)
    first = np.zeros_like(known.judged)
    first[rows[np.unique(groups[rows], return_index=True)[1]]] = True
    return known._replace(found=found, judged=first)


def judge(evidence: Evidence, known: list[Known]) -> tuple[list[JudgementRecord], list[str]]:
    """Judge every measure at every checkpoint and layer against everything that is known; return rows and notes."""
    rows, notes = [], []
    job = evidence.job
    if (repeated := describe_copies(job.groups)) is not None:
        notes.append(repeated)
    for truth in known:
        count, others = (int((truth.found == side)[truth.judged].sum()) for side in (True, False))
        if not count or not others:
            notes.append(f"{truth.name}: {count} to be found among {others} others: there is nothing to distinguish.")
        copies = int(_held_copies(job).sum())
        if copies and truth.name == "membership":
            notes.append(f"membership: {copies} held-out texts are in the data too and are left out.")
        rows += list(_of_truth(evidence, truth))
        try:
            rows.append(_record(truth, BLIND, None, None, 1, _blind(evidence, truth)))
        except DataError as error:
            notes.append(f"{truth.name}: no blind baseline. {error}")
    return rows, notes


def _of_truth(evidence: Evidence, truth: Known) -> Iterator[JudgementRecord]:
    last, measures = len(evidence.seen) - 1, {each.name: each for each in evidence.job.measures}
    for number, (subject, seen) in enumerate(zip(evidence.job.subjects, evidence.seen, strict=True)):
        columns = [(name, None, column) for name, column in seen.measures.items()]
        columns += [(name, layer, column) for layer, found in seen.layers.items() for name, column in found.items()]
        for name, layer, column in columns:
            measure = measures.get(name)
            if measure is None:  # a detail
                continue
            sign = measure.sign_for(truth.name)
            circular = truth.name == "memorized" and number == last and measure.stage == "each model and the bank"
            scored = truth.judged & ~np.isnan(column)
            # A side without values of a measure (a bank has no holdout) leaves nothing to compare.
            lacking = any(
                (truth.judged & side).any() and not (scored & side).any() for side in (truth.found, ~truth.found)
            )
            if not sign or circular or lacking:
                continue
            record = _record(truth, name, subject.number, layer, sign, _attack(sign * column, truth))
            yield record.model_copy(update=_rule(measure, column, truth))


def _attack(scores: Column, truth: Known) -> Attack:
    """Attack the examples whose truth is known."""
    return attack(scores[truth.judged], truth.found[truth.judged])


def _blind(evidence: Evidence, truth: Known) -> Attack:
    rows = np.flatnonzero(truth.judged)
    texts = [evidence.job.texts[row] for row in rows]
    return blind_attack(texts, truth.found[rows], seed=evidence.job.settings.seed)


def _rule(measure: Measure, column: Column, truth: Known) -> dict[str, object]:
    """Return rates at a threshold that was fixed beforehand."""
    rule, sign = measure.rule, measure.sign_for(truth.name)
    if rule is None or (truth.name == "membership") != (rule.finds == "members"):
        return {}
    known = truth.judged & ~np.isnan(column)
    flagged = sign * column >= sign * rule.threshold
    rates = []
    for side in (truth.found, ~truth.found):
        rates.append(span(share(int((flagged & known & side).sum()), int((known & side).sum()))))
    words = f"{measure.name} {'>=' if sign > 0 else '<='} {rule.threshold:g}"
    return {"rule": words, "rule_tpr": rates[0], "rule_fpr": rates[1]}


def _record(
    truth: Known, measure: str, checkpoint: int | None, layer: int | None, sign: int, found: Attack
) -> JudgementRecord:
    return JudgementRecord(
        truth=truth.name,
        measure=measure,
        checkpoint=checkpoint,
        layer=layer,
        sign=sign,
        auc=span(found.auc),
        tpr_at=[_rate(level, rate, sign) for level, rate in found.tpr_at.items()],
        fpr_at=[_rate(level, rate, sign) for level, rate in found.fpr_at.items()],
        found=found.members,
        others=found.others,
        unscored=found.unscored,
    )


def _rate(level: float, rate: Rate, sign: int) -> RateRecord:
    """Return a rate; the threshold is one of the measure itself, not of its oriented score."""
    threshold = sign * rate.threshold if math.isfinite(rate.threshold) else None
    return RateRecord(level=level, rate=span(rate.rate), threshold=threshold, resolved=rate.resolved)


def span(interval: Interval) -> Span:
    """Convert an interval to JSON, which has no NaN."""
    value, low, high = (float(each) if math.isfinite(each) else None for each in interval)
    return value, low, high
