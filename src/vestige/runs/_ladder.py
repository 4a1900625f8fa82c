"""What a run says of its ladder: where rows stood at each rung, and those that the last one did not score."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from vestige.runs._listed import ScoreRow, ScoreTable
from vestige.runs._record import LadderRecord
from vestige.terminal import shorten


class Standing(NamedTuple):
    """Where one example stood at each rung of a ladder."""

    example_id: str
    ranks: tuple[int | None, ...]
    """1-based, a rung each; None where it was not among the first rows of the rung."""


def list_standing(ladder: LadderRecord, query: str, k: int) -> ScoreTable[Standing]:
    """Return where the first `k` proponents of a query, given by its id, stood at each rung."""
    rows = [Standing(example, tuple(ranks)) for example, ranks in list(ladder.stood[query].items())[:k]]
    return ScoreTable(
        rows,
        (*(rung.name for rung in ladder.rungs), "example"),
        lambda row: (*("-" if rank is None else str(rank) for rank in row.ranks), row.example_id),
        f"Ranks of query {shorten(query)} at each rung (-: not among the first {ladder.first})",
    )


def list_below(ladder: LadderRecord, first: Sequence[ScoreRow], count: int) -> list[ScoreRow]:
    """Return rows that the last rung did not score, without a score.

    Args:
        ladder: Of the run.
        first: Rows that the first rung lists, in its order.
        count: How many.
    """
    scored = set(ladder.candidates)
    below = [row for row in first if row.row not in scored][:count]
    unscored = {"score": math.nan, "percentile": None, "strength": None}
    return [row._replace(rank=len(scored) + place, **unscored) for place, row in enumerate(below, 1)]
