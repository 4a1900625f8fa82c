"""Strategies: in which order examples are taken, and why each."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from vestige.errors import DataError, UserError
from vestige.selection._scores import Ranked, ScoreSource, head

_FIRST_LOOK = 64
"""Of each query's ranking, at least so much is read at a time."""


class Candidate(NamedTuple):
    """The next example that a strategy would take."""

    row: int
    score: float | None
    """What the strategy went by; None where it went by none."""
    target: str | None
    """The query or target that chose it."""
    reason: str


class CutShort(NamedTuple):
    """The end of what is known of an order: who wants more has to score again."""

    reason: UserError


Order = Iterator[Candidate | CutShort]


def top_order(scores: ScoreSource, ties: Float[np.ndarray, "example"], least: float | None) -> Order:
    """Order by the highest mean score over all queries."""
    count = len(scores.queries)
    found = head(_at_least(scores.best([range(count)]).score, least), scores.reliable, ties)
    over = "score" if count == 1 else f"mean score over {count} queries"
    for place, (row, score) in enumerate(zip(*found, strict=True), 1):
        yield Candidate(int(row), float(score), None, f"place {place} by {over}")
    yield from _cut_short(scores, len(found.rows))


def target_order(
    scores: ScoreSource,
    targets: dict[str, list[int]],
    ties: Float[np.ndarray, "example"],
    least: float | None,
) -> Order:
    """Order by the highest score for any one target: the selection of LESS (Xia et al. 2024, arXiv:2402.04333).

    A score for a target is the mean over its queries.
    """
    names = list(targets)
    best = scores.best(list(targets.values()))
    found = head(_at_least(best.score, least), scores.reliable, ties)
    for place, (row, score) in enumerate(zip(*found, strict=True), 1):
        name = names[best.target[row]]
        yield Candidate(int(row), float(score), name, f"place {place} by best target, {name}")
    yield from _cut_short(scores, len(found.rows))


def round_robin_order(scores: ScoreSource, ties: Float[np.ndarray, "example"], least: float | None) -> Order:
    """Take for each query, round-robin, its best example that is not taken yet, queries in their order."""
    taken: set[int] = set()
    lists = [_Reader(scores, query, ties, least) for query in range(len(scores.queries))]
    going = list(range(len(lists)))
    while going:
        for query in list(going):
            found = lists[query].next_free(taken)
            if found is None:
                if lists[query].used_up and not scores.complete:
                    yield CutShort(scores.needs_all("A budget of this size"))
                    return
                going.remove(query)
                continue
            taken.add(found.row)
            name = scores.queries[query]
            yield Candidate(found.row, found.score, name, f"place {found.place} of query {name}")


def gumbel_order(
    scores: ScoreSource,
    draws: Float[np.ndarray, "example"],
    ties: Float[np.ndarray, "example"],
    temperature: float,
    least: float | None,
) -> Order:
    """Draw without replacement, an example's odds being `exp(standardised mean score / temperature)`.

    Adding Gumbel noise to log-odds and taking the highest draws without replacement (Kool et al. 2019,
    arXiv:1903.06059). Scores are centred and divided by their standard deviation first, so that the temperature means
    the same for every method.

    Args:
        scores: Of all examples.
        draws: A uniform number for each example.
        ties: Order of equals.
        temperature: Above zero.
        least: No example with a lower mean score.
    """
    means = scores.means()
    known = means[~np.isnan(means)]
    spread = known.std() if len(known) else 0.0
    noise = -np.log(-np.log(draws))
    # Where all scores are equal there is nothing to favour: every order is as likely.
    odds = (means - known.mean()) / (spread * temperature) if spread > 0 else np.where(np.isnan(means), np.nan, 0.0)
    keys = np.where(np.isnan(_at_least(means, least)), np.nan, odds + noise)
    for row in head(keys, len(keys), ties).rows:
        yield Candidate(int(row), float(means[row]), None, f"drawn at temperature {temperature:g}")


def random_order(
    draws: Float[np.ndarray, "example"],
    ties: Float[np.ndarray, "example"],
    scores: ScoreSource | None,
    least: float | None,
) -> Order:
    """Yield rows in the order of `draws`, the same for the same ids and seed."""
    means = None if scores is None or least is None else scores.means()
    allowed = draws if means is None else np.where(np.isnan(_at_least(means, least)), np.nan, draws)
    for row in head(-allowed, len(draws), ties).rows:
        yield Candidate(int(row), None if means is None else float(means[row]), None, "drawn at random")


def whole_texts(order: Order, groups: Int[np.ndarray, "example"], most: int) -> Order:
    """Yield candidates such that of the copies of a text all or none are among the first `most`.

    Args:
        order: Copies of a text follow each other in it.
        groups: The same number for copies of one text; -1 for rows that cannot be chosen.
        most: Rows that will be taken.
    """
    sizes = np.bincount(groups[groups >= 0])
    begun: set[int] = set()
    taken = 0
    for each in order:
        if isinstance(each, Candidate):
            group = int(groups[each.row])
            if group not in begun and taken + sizes[group] > most:
                continue
            begun.add(group)
            taken += 1
        yield each


def diverse_order(
    picks: Iterator[tuple[int, float]], rows: np.ndarray, means: Float[np.ndarray, "example"] | None
) -> Order:
    """Yield what a greedy search over the gradients of `rows` picks, with what each adds to the share represented."""
    for place, gain in picks:
        row = int(rows[place])
        score = None if means is None else float(means[row])
        yield Candidate(row, score, None, f"adds {gain:.3g} to the mean similarity of all to the nearest chosen")


class _Free(NamedTuple):
    row: int
    score: float
    place: int
    """In the query's ranking, from 1."""


class _Reader:
    """One query's ranking, read further only when its head is used up."""

    def __init__(
        self, scores: ScoreSource, query: int, ties: Float[np.ndarray, "example"], least: float | None
    ) -> None:
        self._scores, self._query, self._ties, self._least = scores, query, ties, least
        self._found = Ranked(np.empty(0, dtype=np.int64), np.empty(0))
        self._place = 0
        self.used_up = False
        """Whether the ranking ended, and not because of low scores."""

    def next_free(self, taken: set[int]) -> _Free | None:
        """Return the best example that is not taken, None if there is none."""
        while self._place < len(self._found.rows) or self._read_on():
            row, score = int(self._found.rows[self._place]), float(self._found.scores[self._place])
            if self._least is not None and score < self._least:
                return None
            self._place += 1
            if row not in taken:
                return _Free(row, score, self._place)
        self.used_up = True
        return None

    def _read_on(self) -> bool:
        wanted = max(_FIRST_LOOK, 2 * self._place)
        self._found = self._scores.ranking(self._query, wanted, self._ties)
        return self._place < len(self._found.rows)


def _at_least(scores: Float[np.ndarray, "example"], least: float | None) -> Float[np.ndarray, "example"]:
    """Return the scores with NaN for those below."""
    return scores if least is None else np.where(scores >= least, scores, np.nan)


def _cut_short(scores: ScoreSource, found: int) -> Iterator[CutShort]:
    if found == scores.reliable and not scores.complete:
        yield CutShort(scores.needs_all("A budget of this size"))


def targets_of(queries: Sequence[str], value_of: Callable[[str], str | None] | None) -> dict[str, list[int]]:
    """Return the queries of each target, targets in order of their first query.

    Raises:
        DataError: A query has no target.
    """
    if value_of is None:
        return {name: [number] for number, name in enumerate(queries)}
    found: dict[str, list[int]] = {}
    for number, name in enumerate(queries):
        value = value_of(name)
        if value is None:
            raise DataError(f"Query {name!r} has no value in the column of --targets. Give it one, or leave it out.")
        found.setdefault(value, []).append(number)
    return found
