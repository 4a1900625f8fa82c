"""How two rankings of one query differ: two methods, checkpoints or settings, over the same data."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, final

import numpy as np

from vestige.errors import UserError
from vestige.runs._dense import rank_scores
from vestige.runs._listed import ScoreTable
from vestige.terminal import shorten

if TYPE_CHECKING:
    from vestige.runs import Scores


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


def compare(first: "Scores", other: "Scores", query: int | str, k: int) -> Comparison:
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


def _require_comparable(first: "Scores", other: "Scores", query: str) -> None:
    """Raise unless both runs rank the same examples for the same question.

    Fingerprints differ with the tokenizer, and word searches have none: then the rows that both list have to agree.
    """
    pair = f"{first.folder} and {other.folder}"
    if query not in other.queries:
        raise UserError(f"{other.folder} has no query {query!r}. It has: {', '.join(map(repr, other.queries[:10]))}.")
    if first.query_wording(query).question != other.query_wording(query).question:
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


def _ranks(run: "Scores", query: str) -> dict[int, int]:
    """Return the rank of every training row, or of those that the run lists."""
    if not run.has_dense:
        return {row.row: row.rank for row in run.listed(query, "proponent")}
    _, order, _ = rank_scores(run.dense_of(query), "proponent")
    return dict(zip(order.tolist(), range(1, len(order) + 1), strict=True))


def _correlate(first: "Scores", other: "Scores", query: str) -> float | None:
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
