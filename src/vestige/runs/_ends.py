"""Both ends of a ranking: the listed rows, those behind them, and where rows stood at each rung of a ladder."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vestige import runs
from vestige.runs._dense import rank_scores
from vestige.runs._listed import (
    HEADINGS,
    ScoreRow,
    ScoreTable,
    cells_of,
    excerpt,
    relative_strength,
    turns_or_text,
)
from vestige.runs._record import FIRST_RUNG, LadderRecord
from vestige.runs._summary import End
from vestige.terminal import shorten

if TYPE_CHECKING:
    from vestige.runs import Scores

TITLE_WIDTH = 100


def list_end(scores: "Scores", query: str, end: End, k: int) -> ScoreTable[ScoreRow]:
    """Return the first `k` rows of one end of a query, given by its id: see `Scores.top`."""
    listed, run, note = scores.listed(query, end), scores.run, ""
    rows, kept = listed[:k], len(listed)
    # Where sources are scored, there are fewer columns than training examples.
    summary = run.distribution.get(query)
    scored = summary.count if summary is not None else run.data.examples
    if kept < k and run.ladder is not None and end == "proponent" and kept == scored:
        first = runs.Scores.open(scores.folder / FIRST_RUNG).listed(query, end)
        rows = [*rows, *_list_below(run.ladder, first, k - kept)]
        note = f"(rows that are not scored keep the order of {run.ladder.rungs[0].name})"
    elif kept < min(k, scored) and scores.has_dense:
        rows = [*rows, *_list_further(scores, query, end, k)]
        without = sum(row.row not in scores.tables.examples for row in rows)
        note = f"(the run has no text of {without} of them)" if without else ""
    elif kept < min(k, scored):
        note = f"(the run lists {kept} of {scored}; for more: k={min(k, scored)} or dense=True)"
    explained = scores.query(query).explained
    about = f" ({shorten(explained, TITLE_WIDTH)})" if explained else ""
    words = excerpt(turns_or_text(scores.tables.queries[query]), TITLE_WIDTH)
    return ScoreTable(rows, HEADINGS, cells_of, f"{end}s of query {shorten(query)}: {words}{about}", note)


def _list_further(scores: "Scores", query: str, end: End, k: int) -> list[ScoreRow]:
    """Return the rows of an end behind the listed ones and up to the k-th, from all scores."""
    listed = {row.row for row in scores.listed(query, end)}
    values, order, percentiles = rank_scores(scores.dense_of(query), end)
    highest, ids = float(np.nanmax(values)), scores.tables.dense_ids
    found: list[ScoreRow] = []
    for row in [row for row in order.tolist() if row not in listed][: k - len(listed)]:
        text = scores.tables.listed.get(row)
        shown = ("", None, row, ()) if text is None else (text.text, text.source, row, text.turns)
        rank, score = len(listed) + len(found) + 1, float(values[row])
        found.append(ScoreRow(rank, ids[row], score, percentiles(score), *shown, relative_strength(score, highest)))
    return found


def _list_below(ladder: LadderRecord, first: Sequence[ScoreRow], count: int) -> list[ScoreRow]:
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
