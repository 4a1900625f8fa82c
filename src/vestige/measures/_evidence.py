"""The evidence: measurements of every model, joined with those of a bank; and how well it finds the known examples."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from vestige.banks import Bank
from vestige.data import describe_copies
from vestige.errors import DataError
from vestige.measures._attack import Attack, Interval, Rate, attack, blind_attack, share
from vestige.measures._job import AuditJob, Mask, Numbers
from vestige.measures._losses import margin
from vestige.measures._measure import BLIND, TOTAL_LOSS, BankValues, Column, Losses, Measure, Stage
from vestige.measures._usage import infer_usage
from vestige.runs import JudgementRecord, RateRecord, Span, Truth, UsageRecord

_WIDELY_KNOWN = 0.9
"""Share of the examples that must have a measure for it to take part where all measures are weighed together."""


class Measurements(NamedTuple):
    """Everything that is known of one subject."""

    measures: dict[str, Column]
    """By name; NaN where it cannot be computed."""
    layers: dict[int, dict[str, Column]]
    of_layers: dict[int, dict[str, list[float]]]
    """What is known of a whole layer: "layer:smi" and "layer:directions", by layer."""
    norms: dict[str, dict[str, float]]


class Known(NamedTuple):
    """What is to be found, and where that is known."""

    name: Truth
    found: Mask
    judged: Mask


@dataclass(frozen=True)
class Evidence:
    """Of each subject, and why examples have no value."""

    job: AuditJob
    subjects: list[Measurements]

    @property
    def last(self) -> Measurements:
        """The measurements of the model under audit."""
        return self.subjects[-1]

    @property
    def main_layer(self) -> int | None:
        """The last layer, or the one with most information on the task's labels; the truth plays no part."""
        known = {layer: found["layer:smi"][0] for layer, found in self.last.of_layers.items() if "layer:smi" in found}
        if self.job.settings.choose_layer == "smi" and known:
            return max(known, key=lambda layer: (known[layer], layer))
        return max(self.job.layers, default=None)

    def values(self, name: str, /, *, checkpoint: int | None = None, layer: int | None = None) -> Column | None:
        """Return what `Audit.values` will return of the run; None where it was not measured."""
        numbers = [subject.number for subject in self.job.subjects]
        found = self.last if checkpoint is None else self.subjects[numbers.index(checkpoint)]
        if name in [each.name for each in self.job.at("states")]:
            where = self.main_layer if layer is None else layer
            return None if where is None else found.layers[where].get(name)
        return found.measures.get(name)

    def missing_reasons(self) -> dict[str, tuple[int, str]]:
        """Return, for each measure that some examples lack under the model, how many lack it and why."""
        found, total = {}, len(self.job.data)
        for each in self.job.measures:
            if each.of == "example":
                column = self.values(each.name)
                count = total if column is None else int(np.isnan(column).sum())
                missing = count > 0
            elif each.of == "layer":
                count, missing = total, not any("layer:smi" in one for one in self.last.of_layers.values())
            else:
                count, missing = 0, not self.last.norms
            if missing:
                found[each.name] = count, _reason(self.job, each)
        return found


def gather(job: AuditJob) -> Evidence:
    """Measure every example with every model; what is done already is not done again."""
    from vestige.measures._forward import run_passes

    passes, of_layers, reference = run_passes(job)
    norms = [each.compute(job) for each in job.at("weights")]
    subjects = [
        Measurements(
            _compute_columns(job, found, reference),
            {layer: _take_columns(job, "states", values) for layer, values in layers.items()},
            {layer: _layer_values(values) for layer, values in layers.items()},
            {name: values for each in norms for name, values in each[number].items()},
        )
        for number, (found, layers) in enumerate(zip(passes, of_layers, strict=True))
    ]
    for each in (one for one in job.at("states") if one.since_first and len(subjects) > 1):
        _add_slopes(each.name, subjects)
    course = np.stack([each.measures["loss"] for each in subjects])
    for each in job.at("checkpoints"):
        subjects[-1].measures.update(_finite(each.columns(each.compute(course))))
    if job.bank is not None:
        _add_bank(job, job.bank, subjects)
    return Evidence(job, subjects)


def _add_slopes(name: str, subjects: list[Measurements]) -> None:
    """Add what a measure of states has changed by since the first checkpoint, layer by layer; 0 at the first."""
    for layer, columns in subjects[0].layers.items():
        if (first := columns.get(name)) is not None:
            for each in subjects:
                each.layers[layer][f"{name}_slope"] = each.layers[layer][name] - first


def columns_of(job: AuditJob, measure: Measure, found: Collection[str]) -> list[str]:
    """Return the columns of a measure: its own, and its details, which are no measures themselves.

    Files of pieces hold columns in any order; here the order is the same for every process.
    """
    taken, start = {each.name for each in job.measures}, f"{measure.name}_"
    known = [f"{start}{detail}" for detail in measure.details]
    names = sorted(name for name in found if name.startswith(start) and name not in taken)
    names.sort(key=lambda name: (known.index(name) if name in known else len(known), len(name)))
    return [*(name for name in found if name == measure.name), *names]


def _compute_columns(job: AuditJob, found: Mapping[str, Any], reference: Mapping[str, Any] | None) -> dict[str, Column]:
    """Return the columns of one subject: of its passes, of its losses, and of what it generated."""
    mean, total = found["loss"].numpy(), found[TOTAL_LOSS].numpy()
    other = None if reference is None else reference[TOTAL_LOSS].numpy()
    losses = Losses(mean, total, other, job.data, job.held_out, job.tokenizer, job.settings)
    columns = _take_columns(job, "pass", found)
    for each in job.at("losses"):
        columns |= each.columns(each.compute(losses))
    return _finite(columns | _take_columns(job, "generation", found))


def _finite(columns: Mapping[str, Column]) -> dict[str, Column]:
    return {name: np.where(np.isfinite(column), column, np.nan) for name, column in columns.items()}


def _take_columns(job: AuditJob, stage: Stage, found: Mapping[str, Any]) -> dict[str, Column]:
    return {name: found[name].numpy() for each in job.at(stage) for name in columns_of(job, each, found)}


def _layer_values(found: Mapping[str, Any]) -> dict[str, list[float]]:
    return {name: values.tolist() for name, values in found.items() if name.startswith("layer:")}


def bank_positions(job: AuditJob, bank: Bank) -> Numbers:
    """Return the row in the bank of each example, -1 for one that the bank lacks.

    Raises:
        DataError: Ids repeat, or none is in the bank.
    """
    ids = [example.id for example in job.data.examples[: job.count]]
    found = find_in_bank(bank, ids, job.own_fingerprint)
    return np.append(found, np.full(len(job.data) - job.count, -1))


def find_in_bank(bank: Bank, ids: Sequence[str], fingerprint: str) -> Numbers:
    """Return the row in the bank of each example of data with these ids and this fingerprint, as `bank_positions`."""
    if bank.identity.get("data") == fingerprint and len(bank.example_ids) == len(ids):
        return np.arange(len(ids))
    for name, values in (("the data", ids), ("the bank", bank.example_ids)):
        if len(set(values)) < len(values):
            repeated = Counter(values).most_common(1)[0][0]
            raise DataError(
                f"The bank is of other data or tokens, and the id {repeated!r} repeats in {name}: examples cannot be "
                "distinguished. Give the data that the bank was made of, with the same settings."
            )
    where = {name: row for row, name in enumerate(bank.example_ids)}
    positions = np.array([where.get(name, -1) for name in ids], dtype=np.int64)
    if (positions < 0).all():
        raise DataError(f"None of the {len(ids):,} examples is in the bank. Is it of other data?")
    return positions


def _add_bank(job: AuditJob, bank: Bank, subjects: list[Measurements]) -> None:
    """Add what compares every subject with the bank, and to the model the bank's own measures."""
    settings, positions = job.settings, bank_positions(job, bank)
    known, of = positions >= 0, settings.bank_value
    if settings.bank_subset is not None and settings.bank_subset >= len(bank.subset_names):
        raise DataError(
            f"--bank-subset {settings.bank_subset}: the bank has subsets 0 to {len(bank.subset_names) - 1}."
        )
    left_out = None if settings.bank_subset is None else bank.subsets == settings.bank_subset
    values = -bank.example_token_losses if of == "loss" else bank.values(f"example_{of}")
    target = np.full(len(bank.example_ids), np.nan)
    membership = share_with_copies(bank.membership, job.groups, positions)
    given = BankValues(values, membership, bank.subsets, target, left_out, of)
    for each in job.at("each model and the bank"):
        for one in subjects:
            loss = one.measures["loss"]
            own = {"loss": -loss, "margin": margin(loss), "gap": one.measures["token_gap"]}[of]
            target[positions[known]] = own[known]
            one.measures.update(_spread(each, given, positions))
    target[:] = np.nan
    if of == "loss":
        given = given._replace(values=-bank.values("example_loss"))
    for each in job.at("bank"):
        subjects[-1].measures.update(_spread(each, given, positions))


def share_with_copies(
    membership: Bool[np.ndarray, "member row"], groups: Numbers, positions: Numbers
) -> Bool[np.ndarray, "member row"]:
    """Return where a member was trained on the row or on a copy of it: a bank made elsewhere may have split them."""
    known = positions >= 0
    row = np.arange(membership.shape[1]) + len(groups)
    row[positions[known]] = groups[known]
    order = np.argsort(row, kind="stable")
    begins = np.flatnonzero(np.diff(row[order], prepend=-1))
    found = np.empty_like(membership)
    inside = np.logical_or.reduceat(membership[:, order], begins, axis=1)
    found[:, order] = np.repeat(inside, np.diff(begins, append=len(order)), axis=1)
    return found


def _spread(measure: Measure, given: BankValues, positions: Int[np.ndarray, "example"]) -> dict[str, Column]:
    """Return a measure of the bank's examples as columns of the data."""
    found = {name: column[positions] for name, column in measure.columns(measure.compute(given)).items()}
    return {name: np.where((positions >= 0) & np.isfinite(each), each, np.nan) for name, each in found.items()}


def _reason(job: AuditJob, measure: Measure) -> str:
    if "choices" in measure.needs:
        return max(job.choices.reasons, key=job.choices.reasons.__getitem__, default="one choice alone")
    if "hidden states" in measure.needs and not job.layers:
        return "the model gives no hidden states"
    if "classes" in measure.needs and job.no_classes:
        return job.no_classes
    return measure.missing if isinstance(measure.missing, str) else measure.missing(job)


def find_truths(evidence: Evidence) -> list[Known]:
    """Return what is known: members if there are others, flagged examples, those that a bank shows to be memorized."""
    job, settings = evidence.job, evidence.job.settings
    known: list[Known] = []
    if job.held_out.any():
        known.append(Known("membership", job.own, ~_find_held_copies(job)))
    elif job.bank is not None and settings.bank_subset is not None:
        positions = bank_positions(job, job.bank)
        trained = job.bank.membership[job.bank.subsets == settings.bank_subset]
        if len(trained):
            known.append(Known("membership", np.where(positions >= 0, trained[0][positions], False), positions >= 0))
    if job.flagged is not None:
        known.append(Known("flag", job.flagged, job.own))
    ratio = evidence.last.measures.get("lira")
    if ratio is not None and not np.isnan(ratio).all():
        with np.errstate(invalid="ignore"):
            known.append(Known("memorized", ratio >= settings.memorized_at, ~np.isnan(ratio)))
    return [_judge_once(each, job.groups) for each in known]


def _find_held_copies(job: AuditJob) -> Mask:
    """Return which held-out texts are in the data too."""
    own = set(job.texts[: job.count])
    return job.held_out & np.array([text in own for text in job.texts])


def _judge_once(known: Known, groups: Numbers) -> Known:
    """Judge each text once, by the first of its rows; it is positive if one of its copies is."""
    found = np.bincount(groups, weights=known.found & known.judged)[groups] > 0
    rows = np.flatnonzero(known.judged)
    first = np.zeros_like(known.judged)
    first[rows[np.unique(groups[rows], return_index=True)[1]]] = True
    return known._replace(found=found, judged=first)


def compare_sets(evidence: Evidence, known: list[Known]) -> tuple[UsageRecord | None, list[str]]:
    """Return whether the data as a whole differ from the holdout, by all measures together; and notes."""
    job, truth = evidence.job, next((each for each in known if each.name == "membership"), None)
    if truth is None or not job.held_out.any():
        return None, []
    columns = {
        each.name: each.sign * evidence.last.measures[each.name]
        for each in job.measures
        if each.stage in ("pass", "losses", "checkpoints") and each.sign and not each.relative
        if np.isfinite(evidence.last.measures[each.name][truth.judged]).mean() > _WIDELY_KNOWN
    }
    if not columns:
        return None, ["Usage of the data as a whole cannot be inferred: no measure is known of most examples."]
    scores = np.stack(list(columns.values()), axis=1)
    sides = [np.flatnonzero(truth.judged & side) for side in (truth.found, ~truth.found)]
    if job.pairs is not None:
        sides = list(job.pairs[truth.judged[job.pairs].all(1)].T)
    try:
        found = infer_usage(scores[sides[0]], scores[sides[1]], paired=job.pairs is not None, seed=job.settings.seed)
    except DataError as error:
        return None, [f"Usage of the data as a whole cannot be inferred: {error}"]
    return UsageRecord(**found._asdict() | {"measures": list(columns), "effect": as_span(found.effect)}), []


def judge(evidence: Evidence, known: list[Known]) -> tuple[list[JudgementRecord], list[str]]:
    """Judge every measure at every checkpoint and layer against everything that is known; return rows and notes."""
    rows, job = [], evidence.job
    notes = [] if (repeated := describe_copies(job.groups)) is None else [repeated]
    for truth in known:
        count, others = (int((truth.found == side)[truth.judged].sum()) for side in (True, False))
        if not count or not others:
            notes.append(f"{truth.name}: {count} to be found among {others} others: there is nothing to distinguish.")
        copies = int(_find_held_copies(job).sum())
        if copies and truth.name == "membership":
            notes.append(f"membership: {copies} held-out texts are in the data too and are left out.")
        rows += list(_judge_truth(evidence, truth))
        chosen = np.flatnonzero(truth.judged)
        try:
            found = blind_attack([job.texts[row] for row in chosen], truth.found[chosen], seed=job.settings.seed)
            rows.append(_make_record(truth, found, measure=BLIND, checkpoint=None, layer=None, sign=1))
        except DataError as error:
            notes.append(f"{truth.name}: no blind baseline. {error}")
    return rows, notes


def _judge_truth(evidence: Evidence, truth: Known) -> Iterator[JudgementRecord]:
    last, measures = evidence.last, {each.name: each for each in evidence.job.measures}
    for subject, found in zip(evidence.job.subjects, evidence.subjects, strict=True):
        columns = [(name, None, column) for name, column in found.measures.items()]
        columns += [(name, layer, column) for layer, each in found.layers.items() for name, column in each.items()]
        for name, layer, column in columns:
            measure = measures.get(name)
            if measure is None:  # a detail
                continue
            sign = measure.sign_for(truth.name)
            circular = truth.name == "memorized" and found is last and measure.stage == "each model and the bank"
            scored = truth.judged & ~np.isnan(column)
            # A side without values of a measure (a bank has no holdout) leaves nothing to compare.
            lacking = any(
                (truth.judged & side).any() and not (scored & side).any() for side in (truth.found, ~truth.found)
            )
            if not sign or circular or lacking:
                continue
            result = attack((sign * column)[truth.judged], truth.found[truth.judged])
            facts = {"measure": name, "checkpoint": subject.number, "layer": layer, "sign": sign}
            yield _make_record(truth, result, **facts, **_judge_rule(measure, column, truth))


def _judge_rule(measure: Measure, column: Column, truth: Known) -> Mapping[str, Any]:
    """Return rates at a threshold that was fixed beforehand."""
    rule, sign = measure.rule, measure.sign_for(truth.name)
    if rule is None or (truth.name == "membership") != (rule.finds == "members"):
        return {}
    known = truth.judged & ~np.isnan(column)
    flagged = sign * column >= sign * rule.threshold
    sides = [known & side for side in (truth.found, ~truth.found)]
    rates = [as_span(share(int((flagged & side).sum()), int(side.sum()))) for side in sides]
    words = f"{measure.name} {'>=' if sign > 0 else '<='} {rule.threshold:g}"
    return {"rule": words, "rule_tpr": rates[0], "rule_fpr": rates[1]}


def _make_record(truth: Known, found: Attack, *, sign: int, **facts: Any) -> JudgementRecord:
    return JudgementRecord(
        truth=truth.name,
        sign=sign,
        auc=as_span(found.auc),
        tpr_at=[_make_rate(level, rate, sign) for level, rate in found.tpr_at.items()],
        fpr_at=[_make_rate(level, rate, sign) for level, rate in found.fpr_at.items()],
        found=found.members,
        others=found.others,
        unscored=found.unscored,
        **facts,
    )


def _make_rate(level: float, rate: Rate, sign: int) -> RateRecord:
    """Return a rate; the threshold is one of the measure itself, not of its oriented score."""
    threshold = sign * rate.threshold if math.isfinite(rate.threshold) else None
    return RateRecord(level=level, rate=as_span(rate.rate), threshold=threshold, resolved=rate.resolved)


def as_span(interval: Interval) -> Span:
    """Convert an interval to JSON, which has no NaN."""
    value, low, high = (float(each) if math.isfinite(each) else None for each in interval)
    return value, low, high
