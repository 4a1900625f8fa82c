"""Looks up, for each reworded question, where the pair that it rewords stands in the ranking."""

import json
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as parquet

TOP = 3


class Outcome(NamedTuple):
    """One reworded question after attribution."""

    question: str
    answer: str
    expected: str
    rank: int | None
    """Place of the expected pair among the proponents, from 1; None if it is not stored among them."""


def outcomes(run: Path, questions: Path) -> list[Outcome]:
    """One outcome for each row of `questions`, in its order."""
    scores = parquet.read_table(run / "scores.parquet").to_pylist()
    answers = {row["query_id"]: row["completion"] for row in parquet.read_table(run / "queries.parquet").to_pylist()}
    ranks = {(row["query_id"], row["example_id"]): row["rank"] for row in scores if row["end"] == "proponent"}
    rows = [json.loads(line) for line in questions.read_text(encoding="utf-8").splitlines()]
    return [
        Outcome(row["question"], answers[row["id"]].strip(), row["expected"], ranks.get((row["id"], row["expected"])))
        for row in rows
    ]


def print_outcomes(found: list[Outcome]) -> None:
    """A line for each question, then for how many of them the expected pair is among the first `TOP`."""
    for outcome in found:
        place = f"rank {outcome.rank}" if outcome.rank else "not listed"
        print(f"{place:>10}  {outcome.question}  ->  {outcome.answer}\n{'':12}{outcome.expected}")
    hits = sum(outcome.rank is not None and outcome.rank <= TOP for outcome in found)
    print(f"\nThe pair behind the question is among the top {TOP} for {hits} of {len(found)} reworded questions.")
