"""Rankings as tables: an end of one, where rows stood at each rung of a ladder, and how those of two runs differ."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, final

import numpy as np

from vestige import runs
from vestige.errors import UserError
from vestige.runs._dense import rank_scores
from vestige.runs._listed import HEADINGS, ScoreRow, ScoreTable, cells_of, excerpt, relative_strength
from vestige.runs._record import FIRST_RUNG, LadderRecord
from vestige.runs._summary import End
from vestige.terminal import shorten

TITLE_WIDTH = 100


def list_end(scores: "runs.Scores", query: str, end: End, k: int) -> ScoreTable[ScoreRow]:
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
    words = excerpt(scores.query(query).wording.shown, TITLE_WIDTH)
    return ScoreTable(rows, HEADINGS, cells_of, f"{end}s of query {shorten(query)}: {words}{about}", note)


def _list_further(scores: "runs.Scores", query: str, end: End, k: int) -> list[ScoreRow]:
    """Return the rows of an end behind the listed ones and up to the k-th, from all scores."""
    listed = {row.row for row in scores.listed(query, end)}
    values, order, percentiles = rank_scores(scores.dense_of(query), end)
    highest, ids = float(np.nanmax(values)), scores.tables.dense_ids
    found: list[ScoreRow] = []
    for row in [row for row in order.tolist() if row not in listed][: k - len(listed)]:
        known = scores.tables.examples.get(row)
        shown = ("", None, row, ())
        if known is not None:
            shown = (known.wording.whole, known.source, row, known.wording.messages)
        rank, score = len(listed) + len(found) + 1, float(values[row])
        found.append(ScoreRow(rank, ids[row], score, percentiles(score), *shown, relative_strength(score, highest)))
    return found


def _list_below(ladder: LadderRecord, first: Sequence[ScoreRow], count: int) -> list[ScoreRow]:
    """Return the first `count` of the rows of the first rung that the last one did not score, without a score."""
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


class RankChange(NamedTuple):
    """One training example in two rankings."""

    example_id: str
    row: int
    """Position in the training data."""
    rank: int | None
    """In the first run, 1-based; None where it is not listed there."""
    other_rank: int | None
    text: str
    turns: tuple[tuple[str, str], ...] = ()

    @property
    def change(self) -> int | None:
        """Places that the example rises from the first run to the other; None where one does not list it."""
        return None if self.rank is None or self.other_rank is None else self.rank - self.other_rank


@final
class Comparison(ScoreTable[RankChange]):
    """The first examples of both rankings, in the order of the first run, then those that it does not have."""

    def __init__(self, rows: Sequence[RankChange], shared: int, k: int, correlation: float | None, title: str) -> None:
        """Use `Scores.compare`."""
        super().__init__(rows, ("example", "rank", "other", "change", "text"), _cells, title)
        self.shared = shared
        """Examples that are among the first `k` of both."""
        self.k = k
        self.correlation = correlation
        """Spearman's, over all examples; None unless both runs have all scores."""


def compare(first: "runs.Scores", other: "runs.Scores", query: int | str, k: int) -> Comparison:
    """Compare the first `k` proponents of a query in two runs; see `Scores.compare`."""
    name = first.query_id(query)
    _require_comparable(first, other, name)
    ours, theirs = first.top(name, k), other.top(name, k)
    wanted = {row.row: row for row in (*ours, *theirs)}
    ranks, other_ranks = _ranks(first, name), _ranks(other, name)
    changes = [
        RankChange(row.example_id, row.row, ranks.get(row.row), other_ranks.get(row.row), row.text, row.turns)
        for row in wanted.values()
    ]
    shared = len({row.row for row in ours} & {row.row for row in theirs})
    correlation = _correlate(first, other, name)
    words = "" if correlation is None else f", rank correlation over all examples {correlation:.2f}"
    pair = " and ".join(f"{run.run.method} ({shorten(str(run.folder))})" for run in (first, other))
    title = f"query {shorten(name)}: {shared} of the first {k} are shared by {pair}{words}"
    return Comparison(changes, shared, k, correlation, title)


def _require_comparable(first: "runs.Scores", other: "runs.Scores", query: str) -> None:
    """Raise unless both runs rank the same examples for the same question.

    Fingerprints differ with the tokenizer, and word searches have none: then the rows that both list have to agree.
    """
    pair = f"{first.folder} and {other.folder}"
    if query not in other.queries:
        raise UserError(f"{other.folder} has no query {query!r}. It has: {', '.join(map(repr, other.queries[:10]))}.")
    if first.query(query).question != other.query(query).question:
        raise UserError(f"The query {query!r} is another question in {pair}. Compare runs of the same queries.")
    if first.run.data.fingerprint == other.run.data.fingerprint:
        return
    same = first.run.data.examples == other.run.data.examples
    known, others = ({row.row: (row.example_id, row.text) for row in run.all_listed()} for run in (first, other))
    both = known.keys() & others.keys()
    if not same or not both or any(known[row] != others[row] for row in both):
        raise UserError(
            f"{pair} are of different data ({first.run.data.name} with {first.run.data.examples:,} examples, "
            f"{other.run.data.name} with {other.run.data.examples:,}), so a rank in one means nothing in the other. "
            "Compare runs of the same data."
        )


def _ranks(run: "runs.Scores", query: str) -> dict[int, int]:
    """Return the rank of every training row, or of those that the run lists."""
    if not run.has_dense:
        return {row.row: row.rank for row in run.listed(query, "proponent")}
    _, order, _ = rank_scores(run.dense_of(query), "proponent")
    return dict(zip(order.tolist(), range(1, len(order) + 1), strict=True))


def _correlate(first: "runs.Scores", other: "runs.Scores", query: str) -> float | None:
    if not (first.has_dense and other.has_dense):
        return None
    from scipy.stats import rankdata

    one, two = first.dense_of(query), other.dense_of(query)
    known = np.isfinite(one) & np.isfinite(two)
    value = float(np.corrcoef(rankdata(one[known]), rankdata(two[known]))[0, 1]) if known.sum() > 1 else float("nan")
    return value if np.isfinite(value) else None


def _cells(row: RankChange) -> tuple[Any, ...]:
    ranks = ("–" if rank is None else str(rank) for rank in (row.rank, row.other_rank))
    change = "" if row.change is None else f"{row.change:+d}" if row.change else "="
    return shorten(row.example_id), *ranks, change, row.turns or row.text
