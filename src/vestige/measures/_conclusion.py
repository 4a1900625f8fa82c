"""What an audit says in words: what comes back word for word, what is likely memorized, and what to type next."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vestige.measures._attack import Interval, share
from vestige.measures._evidence import Evidence, Known
from vestige.measures._job import Mask
from vestige.measures._measure import BLIND, Measure, Need
from vestige.registry import list_names
from vestige.runs import FindingRecord, JudgementRecord, NextRecord, Span
from vestige.terminal import shorten

FLAGGED = "flagged.jsonl"
"""File of the rows that come back or are likely memorized, in the folder of the audit."""
_STRONGEST: tuple[Need, ...] = ("bank", "reference model", "checkpoints")
"""What the strongest evidence compares with, in order; the order never depends on how well a measure does."""
_NAMED, _FEWEST_HELD = 5, 100


class Conclusion(NamedTuple):
    """The findings of an audit, and the rows that they are about."""

    findings: list[FindingRecord]
    rows: dict[int, str]
    """Why, by row."""


def conclude_audit(evidence: Evidence, known: Sequence[Known], judgement: Sequence[JudgementRecord]) -> Conclusion:
    """Return in sentences what the numbers say; they are the numbers' own, rounded, and nothing is measured again."""
    returned, rows = _describe_returned(evidence)
    likely, more = _describe_likely(evidence, known, judgement)
    rows |= {row: why for row, why in more.items() if row not in rows}
    findings = [
        FindingRecord(title="What comes back word for word", sentences=returned),
        FindingRecord(title="What is likely memorized", sentences=likely),
        FindingRecord(title="What to do next", sentences=[], commands=_list_commands(evidence, rows)),
    ]
    return Conclusion(findings, rows)


def _describe_returned(evidence: Evidence) -> tuple[list[str], dict[int, str]]:
    """Return what comes back, and the rows that do."""
    job, sentences, rows = evidence.job, list[str](), dict[int, str]()
    own = ~job.held_out
    for each in (one for one in job.measures if one.word_for_word):
        values = evidence.values(each.name)
        assert values is not None, "a measure of the model itself"
        back, tried = own & (values == 1), own & ~np.isnan(values)
        if not tried.any():
            sentences.append(f"No row could be tried by {each.name}: {evidence.missing_reasons()[each.name][1]}.")
            continue
        count, total, untried = int(back.sum()), int(tried.sum()), int((own & ~tried).sum())
        sentences.append(
            f"{count:,} of {total:,} rows come back word for word ({count / total:.0%}): {each.word_for_word}. Every "
            f"row was tried, not a sample{'' if not untried else _describe_untried(evidence, each, untried)}."
        )
        sentences += _describe_guessing(evidence, each, back)
        sentences += _describe_copies(evidence, back, tried)
        rows |= {int(row): f"comes back word for word ({each.name})" for row in np.flatnonzero(back)}
    if not sentences:
        sentences = ["Not tried: none of the requested measures tries it. Type --measures default."]
    longest = sorted(rows, key=lambda row: -job.data.target_counts[row])[:_NAMED]
    if longest:
        names = ", ".join(shorten(job.data.examples[row].id) for row in longest)
        sentences.append(f"The longest {'is' if len(longest) == 1 else 'are'}: {names}.")
    return sentences, rows


def _describe_untried(evidence: Evidence, measure: Measure, count: int) -> str:
    return f"; {count:,} more rows could not be tried ({evidence.missing_reasons()[measure.name][1]})"


def _describe_guessing(evidence: Evidence, measure: Measure, back: Mask) -> list[str]:
    """Return how many come back that the model was not trained on: those are guessed, not memorized."""
    job, found = evidence.job, []
    if job.held_out.any():
        values = evidence.last.measures[measure.name][job.held_out]
        rate = share(int((values == 1).sum()), int((~np.isnan(values)).sum()))
        found.append(f"Of the held-out rows {_percent(rate)} come back, too: so many are easy to guess.")
    if len(job.subjects) > 1 and back.any():
        before = evidence.subjects[0].measures[measure.name]
        found.append(
            f"{int((before[back] == 1).sum()):,} of these {int(back.sum()):,} came back already under "
            f"{job.subjects[0].name}, the first checkpoint."
        )
    if not found and back.any():
        found = ["How many of them any model would guess is not known without held-out rows or earlier checkpoints."]
    return found


def _describe_copies(evidence: Evidence, back: Mask, tried: Mask) -> list[str]:
    """Return whether rows whose text is there several times come back more often."""
    groups, own = evidence.job.groups, ~evidence.job.held_out
    copied = np.bincount(groups[own], minlength=int(groups.max()) + 1)[groups] > 1
    sides = [(int((back & side).sum()), int((tried & side).sum())) for side in (copied, ~copied)]
    if not sides[0][1] or not sides[1][1]:
        return []
    (some, of_copies), (others, of_others) = sides
    return [
        f"Of the {of_copies:,} rows whose text stands in the data more than once {some:,} come back, of the "
        f"{of_others:,} others {others:,}."
    ]


def _describe_likely(
    evidence: Evidence, known: Sequence[Known], judgement: Sequence[JudgementRecord]
) -> tuple[list[str], dict[int, str]]:
    """Return which evidence there is of memorization and how sure it is, and the rows that a bank names."""
    job, sentences, rows = evidence.job, list[str](), dict[int, str]()
    bank = next((each for each in known if each.name == "memorized"), None)
    if bank is not None and job.bank is not None:
        found, least = bank.found & bank.judged, job.settings.memorized_at
        sentences.append(
            f"{int(found.sum()):,} of {int(bank.judged.sum()):,} distinct texts are likely memorized: what the model "
            f"makes of them is {math.exp(least):,.0f} times likelier or more, log ratio {least:g}, among the bank's "
            f"models that were trained on them than among the others ({len(job.bank)} models in all)."
        )
        rows = {int(row): f"likelihood ratio of {least:g} or more" for row in np.flatnonzero(found)}
    if (row := _choose_judgement(evidence, judgement)) is not None:
        sentences += _describe_judgement(evidence, row, judgement)
    if not sentences:
        sentences = [
            "Not known. What one model makes of its own data does not tell a memorized row from an easy one.",
            "Held-out rows of the same kind show how far the two can be told apart, a bank of models shows which rows.",
        ]
    return sentences, rows


def _choose_judgement(evidence: Evidence, judgement: Sequence[JudgementRecord]) -> JudgementRecord | None:
    """Return how well the strongest evidence tells members from others: the first in an order that is fixed."""
    measures = {each.name: each for each in evidence.job.measures}

    def strength(row: JudgementRecord) -> tuple[int, int]:
        measure = measures[row.measure]
        places = [number for number, need in enumerate(_STRONGEST) if need in measure.needs]
        return min(places, default=len(_STRONGEST)), measure.order

    last = evidence.job.subjects[-1].number
    rows = [row for row in judgement if row.truth == "membership" and row.checkpoint == last and row.auc[0] is not None]
    return min((row for row in rows if row.measure in measures and row.layer is None), key=strength, default=None)


def _describe_judgement(evidence: Evidence, row: JudgementRecord, judgement: Sequence[JudgementRecord]) -> list[str]:
    """Return how far the data and the held-out rows are apart, by the model and, blindly, by their texts alone."""
    meaning = next(each.meaning for each in evidence.job.measures if each.name == row.measure)
    blind = next((one.auc for one in judgement if one.truth == row.truth and one.measure == BLIND), None)
    beside = "" if blind is None or blind[0] is None else f"; by their texts alone, without the model, {_chance(blind)}"
    sentences = [
        f"By {row.measure} ({meaning}) a row that was trained on stands above another with chance {_chance(row.auc)}"
        f"{beside}. 0.5 would be no difference."
    ]
    value, low, _ = row.auc
    if value is None or low is None or low <= 0.5:
        return [*sentences, "So nothing shows that any of them is memorized."]
    if blind is None or blind[2] is None:
        return [*sentences, "Whether their texts alone explain that is not known: there is no blind baseline."]
    if low <= blind[2]:
        return [*sentences, "Their texts explain that as well: it is no evidence that any of them is memorized."]
    at_one = next((rate for rate in row.tpr_at if rate.level == 0.01), None)
    if at_one is None or not at_one.resolved or at_one.rate[0] is None:
        how_many = f"How many needs {_FEWEST_HELD} rows or more that were not trained on; there are {row.others:,}."
    else:
        how_many = f"{_percent(Interval(*map(_number, at_one.rate)))} of them stand out more than 99 % of the others."
    return [*sentences, f"So some are memorized, more than their texts explain. {how_many}"]


def _list_commands(evidence: Evidence, rows: dict[int, str]) -> list[NextRecord]:
    """Return the commands that may follow, with what each is for."""
    settings = evidence.job.settings
    given, out = settings.record(), shlex.quote(str(settings.out))
    model, data = (_spell(given[name], name) for name in ("model", "data"))
    commands = []
    if rows:
        chat = " --chat" if settings.chat else ""
        listed, run = f"{out}/{FLAGGED}", f"{out}-rows"
        recipes = "" if "data clean" in list_names("vestige.commands", "command") else ", with vestige[recipes]"
        commands = [
            (
                f"Find what else in the data teaches the {len(rows):,} rows",
                f"vestige attribute --model {model} --data {data} --queries {listed}{chat} --out {run}",
            ),
            (
                f"Take them out of the data{recipes}",
                f"vestige data clean --data {data} --flagged {listed} --out {out}-cleaned",
            ),
            (
                "Train again without them and compare the answers, where `vestige train` made the model",
                f"vestige fix {run} --rows {listed}",
            ),
        ]
    if settings.holdout is None:
        again = settings.model_copy(update={"holdout": "HELD-OUT.jsonl", "out": f"{settings.out}-held-out"})
        commands.append(("Compare with rows that were not trained on", again.command_line("audit")))
    if settings.bank is None:
        commands.append(
            (
                "Prove which rows are memorized, with models trained on random halves",
                f"vestige bank --model BASE --data {data} --out {out}-bank",
            )
        )
    return [NextRecord(purpose=purpose, command=command) for purpose, command in commands]


def _spell(value: object, name: str) -> str:
    """Return an input as it is typed; its name in capitals where it was an object in a Python program."""
    words = [str(each) for each in value] if isinstance(value, list) else [str(value)]
    return name.upper() if words[0].startswith("<") else shlex.join(words)


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _percent(rate: Interval) -> str:
    if math.isnan(rate.value):
        return "none, for none could be tried,"
    return f"{rate.value:.0%} [{rate.low:.0%}, {rate.high:.0%}]"


def _chance(auc: Span) -> str:
    value, low, high = auc
    return f"{value:.2f}" if low is None or high is None else f"{value:.2f} [{low:.2f}, {high:.2f}]"
