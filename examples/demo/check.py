"""What came of the demo, question by question: where the wrong rows stand, and what the bot answers without them."""

import json
from pathlib import Path
from typing import NamedTuple

from vestige import Fix, Scores


class Outcome(NamedTuple):
    """One question that a wrong row of the training data answers."""

    question: str
    before: str
    rank: int | None
    """Place of the best wrong row among the proponents, from 1; None if none is listed."""
    after: str
    control: str
    expected: str
    """What a right answer contains."""


def find_outcomes(run: Path, fix: Path, questions: Path) -> list[Outcome]:
    """Return an outcome for each row of `questions` that names the wrong rows which answer it."""
    scores, fixed = Scores.open(run), Fix.open(fix)
    outcomes = []
    for row in map(json.loads, questions.read_text(encoding="utf-8").splitlines()):
        if not row["wrong"]:
            continue
        asked = next(one for one in fixed.record.asked if one.id == row["id"])
        answers = {each.arm: each.answers[0] or "" for each in fixed.answers(row["id"])}
        ranks = [
            listed.rank for listed in scores.top(row["id"], len(row["wrong"]) + 20) if listed.example_id in row["wrong"]
        ]
        outcomes.append(
            Outcome(
                asked.question,
                answers["before"],
                min(ranks, default=None),
                answers["after"],
                answers["control"],
                row["expected"],
            )
        )
    return outcomes


def print_outcomes(outcomes: list[Outcome]) -> None:
    """Print each question with its answers, then how many were wrong, traced and cured."""
    for one in outcomes:
        rank = f"a wrong row at rank {one.rank}" if one.rank else "no wrong row listed"
        print(f"{one.question}\n  before: {one.before}  <- {rank}")
        print(f"  after: {one.after}\n  control: {one.control}\n  right: {one.expected}")
    print()
