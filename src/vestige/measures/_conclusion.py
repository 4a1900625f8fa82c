"""What an audit says in words: what comes back word for word, what is likely memorized, and what to type next."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vestige.measures._attack import Interval, Mask, share
from vestige.measures._evidence import Evidence, Known
from vestige.measures._measure import BLIND, Measure, Need
from vestige.registry import list_names
from vestige.runs import FindingRecord, JudgementRecord, NextRecord, Span
from vestige.terminal import shorten

FLAGGED = "flagged.jsonl"
"""File of the rows that come back or are likely memorized, in the folder of the audit."""
_STRONGEST: tuple[Need, ...] = ("bank", "reference model", "checkpoints")
"""What the strongest evidence compares with, in order; the order never depends on how well a measure does."""
_NAMED, _FEWEST_OTHERS = 5, 100


def conclude_audit(
    evidence: Evidence, known: Sequence[Known], judgement: Sequence[JudgementRecord]
) -> tuple[list[FindingRecord], dict[int, str]]:
    """Return in sentences what the numbers say, and the rows that they are about with the reason; measure nothing."""
    returned, rows = _describe_returned(evidence)
    likely, more = _describe_likely(evidence, known, judgement)
    rows = more | rows
    findings = [
        FindingRecord(title="What comes back word for word", sentences=returned),
        FindingRecord(title="What is likely memorized", sentences=likely),
        FindingRecord(title="What to do next", sentences=[], commands=_list_commands(evidence, len(rows))),
    ]
    return findings, rows


def _describe_returned(evidence: Evidence) -> tuple[list[str], dict[int, str]]:
    """Return what comes back, and the rows that do."""
    job, sentences, rows = evidence.job, list[str](), dict[int, str]()
    own = job.own
    for each in (one for one in job.measures if one.word_for_word):
        values = evidence.last.measures[each.name]
        back, tried = own & (values == 1), own & ~np.isnan(values)
        count, total, untried = int(back.sum()), int(tried.sum()), int((own & ~tried).sum())
        reason = evidence.missing_reasons()[each.name][1] if untried else ""
        if not total:
            sentences.append(f"No row could be tried by {each.name}: {reason}.")
            continue
        others = f"{untried:,} more could not be tried: {reason}." if untried else "Every row was tried, no sample."
        how = f"{each.word_for_word[:1].upper()}{each.word_for_word[1:]}. {others}"
        sentences += [f"{count:,} of {total:,} rows come back word for word ({count / total:.0%}).", how]
        sentences += [*_describe_guesses(evidence, each, back), *_describe_copies(evidence, back, tried)]
        rows |= {int(row): f"comes back word for word ({each.name})" for row in np.flatnonzero(back)}
    longest = sorted(rows, key=lambda row: -job.data.target_counts[row])[:_NAMED]
    if longest:
        sentences.append(f"The longest: {', '.join(shorten(job.data.examples[row].id) for row in longest)}.")
    return sentences or ["Not tried: no requested measure tries it. Type --measures default."], rows


def _describe_guesses(evidence: Evidence, measure: Measure, back: Mask) -> list[str]:
    """Return how many come back that the model was not trained on: those are guessed, not memorized."""
    job, found = evidence.job, list[str]()
    held = evidence.last.measures[measure.name][job.held_out]
    tried = int((~np.isnan(held)).sum())
    if tried:
        count = int((held == 1).sum())
        rate = _percent(share(count, tried))
        found.append(f"Of {tried:,} held-out rows {count:,} come back ({rate}): any model guesses that many.")
    elif back.any() and len(job.subjects) == 1:
        found.append("How many of them any model would guess is not known without held-out rows or checkpoints.")
    return found


def _describe_learned(evidence: Evidence) -> list[str]:
    """Return how many rows come back that did not under the first checkpoint."""
    job, own = evidence.job, evidence.job.own
    names = [each.name for each in job.measures if each.word_for_word]
    if len(job.subjects) < 2 or not names:
        return []
    now, then = (
        own & np.any([found.measures[name] == 1 for name in names], axis=0)
        for found in (evidence.last, evidence.subjects[0])
    )
    new, kept = int((now & ~then).sum()), int((now & then).sum())
    since = Path(job.subjects[0].name).name
    return [f"{new:,} rows were learned word for word since {since}: they come back now; {kept:,} came back then."]


def _describe_copies(evidence: Evidence, back: Mask, tried: Mask) -> list[str]:
    """Return whether rows whose text is there several times come back more often."""
    groups, own = evidence.job.groups, evidence.job.own
    copied = np.bincount(groups[own], minlength=int(groups.max()) + 1)[groups] > 1
    (some, of_copies), (others, of_others) = (
        (int((back & side).sum()), int((tried & side).sum())) for side in (copied, ~copied)
    )
    if not of_copies or not of_others:
        return []
    repeated = f"{some:,} of the {of_copies:,} rows whose text repeats come back"
    return [f"{repeated}, and {others:,} of the {of_others:,} others."]


def _describe_likely(
    evidence: Evidence, known: Sequence[Known], judgement: Sequence[JudgementRecord]
) -> tuple[list[str], dict[int, str]]:
    """Return which evidence there is of memorization and how sure it is, and the rows that a bank names."""
    job, sentences, rows = evidence.job, _describe_learned(evidence), dict[int, str]()
    memorized = next((each for each in known if each.name == "memorized"), None)
    if memorized is not None and job.bank is not None:
        found, least = memorized.found & memorized.judged, job.settings.memorized_at
        sentences += [
            f"{int(found.sum()):,} of {int(memorized.judged.sum()):,} distinct texts are likely memorized.",
            f"What the model makes of them is at least {math.exp(least):,.0f} times likelier among models that were "
            f"trained on them than among the others (log ratio {least:g}; {len(job.bank)} models).",
        ]
        rows = {int(row): f"likelihood ratio of {least:g} or more" for row in np.flatnonzero(found)}
    chosen = _choose_judgement(evidence, judgement)
    if chosen is not None:
        blind = next((one.auc for one in judgement if one.truth == chosen.truth and one.measure == BLIND), None)
        sentences += _describe_judgement(evidence, chosen, blind)
    if not sentences:
        sentences = [
            "Not known.",
            "What one model makes of its own data does not tell a memorized row from an easy one. "
            "Held-out rows show how far the two can be distinguished; a bank of models, which rows it is.",
        ]
    return sentences, rows


def _choose_judgement(evidence: Evidence, judgement: Sequence[JudgementRecord]) -> JudgementRecord | None:
    """Return how well the strongest evidence tells members from others: the first in an order that is fixed."""
    measures = {each.name: each for each in evidence.job.measures}
    last = evidence.job.subjects[-1].number

    def strength(row: JudgementRecord) -> tuple[int, int]:
        measure = measures[row.measure]
        places = [place for place, need in enumerate(_STRONGEST) if need in measure.needs]
        return min(places, default=len(_STRONGEST)), measure.order

    rows = (
        row
        for row in judgement
        if (row.truth, row.checkpoint, row.layer) == ("membership", last, None) and row.auc[0] is not None
    )
    return min(rows, key=strength, default=None)


def _describe_judgement(evidence: Evidence, row: JudgementRecord, blind: Span | None) -> list[str]:
    """Return how far the data and the held-out rows are apart, by the model and, blindly, by their texts alone."""
    meaning = next(each.meaning for each in evidence.job.measures if each.name == row.measure)
    beside = "" if blind is None else f"; by their texts alone, without the model, {_chance(blind)}"
    compared = (
        f"By {row.measure} ({meaning}) a row that was trained on stands above another with chance {_chance(row.auc)}"
        f"{beside}. No difference is 0.5."
    )
    low, high = row.auc[1], None if blind is None else blind[2]
    if low is None or low <= 0.5:
        return ["Held-out rows look the same to the model, which is no evidence of memorization.", compared]
    if high is None:
        return ["The model tells them from held-out rows; whether their texts do is not known.", compared]
    if low <= high:
        return ["The model tells them from held-out rows, and so may their texts alone.", compared]
    rate = next((each.rate for each in row.tpr_at if each.level == 0.01 and each.resolved), None)
    if rate is None or None in rate:
        many = f"To say how many takes {_FEWEST_OTHERS} rows that were not trained on; there are {row.others:,}."
    else:
        many = f"{_percent(rate)} of them stand above 99 % of the others."
    return ["The model tells them from held-out rows by more than their texts: some are memorized.", compared, many]


def _list_commands(evidence: Evidence, rows: int) -> list[NextRecord]:
    """Return the commands that may follow, with what each is for."""
    settings = evidence.job.settings
    given, out = settings.record(), shlex.quote(str(settings.out))
    model, data = (_spell(given[name], name) for name in ("model", "data"))
    found: list[tuple[str, str]] = []
    if rows:
        listed, chat = f"{out}/{FLAGGED}", " --chat" if settings.chat else ""
        recipes = "" if "data clean" in list_names("vestige.commands", "command") else " (with vestige[recipes])"
        found = [
            (
                f"Find what else in the data teaches these {rows:,} rows",
                f"vestige attribute --model {model} --data {data} --queries {listed}{chat} --out {out}-rows",
            ),
            (
                f"Take them out of the data{recipes}",
                f"vestige data clean --data {data} --flagged {listed} --out {out}-cleaned",
            ),
            (
                "Train again without them and compare the answers, if `vestige train` made the model",
                f"vestige fix {out}-rows --rows {listed}",
            ),
        ]
    if settings.holdout is None:
        changes = {"holdout": "HELD-OUT.jsonl", "out": f"{settings.out}-held-out", "overwrite": False}
        again = settings.model_copy(update=changes).command_line("audit")
        found.append(("Compare with rows that were not trained on", again))
    if settings.bank is None:
        bank = f"vestige bank --model BASE --data {data} --out {out}-bank"
        found.append(("Prove which rows are memorized, by models of random halves", bank))
    return [NextRecord(purpose=purpose, command=command) for purpose, command in found]


def _spell(value: Any, name: str) -> str:
    """Return an input as it is typed; its name in capitals where it was an object in a Python program."""
    words = list(map(str, value)) if isinstance(value, list) else [str(value)]
    return name.upper() if words[0].startswith("<") else shlex.join(words)


def _percent(rate: Interval | Span) -> str:
    return "{:.0%} [{:.0%}, {:.0%}]".format(*rate)


def _chance(auc: Span) -> str:
    value, low, high = auc
    return "unknown" if value is None else f"{value:.2f}" if None in auc else f"{value:.2f} [{low:.2f}, {high:.2f}]"
