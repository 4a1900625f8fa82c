"""The scores of each source: sum, spread, and how much more influence than rows a source holds, for some queries."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from vestige import runs
from vestige.runs._record import GroupRecord

NO_SOURCE = "(no source)"
FEW_ROWS = 5
"""Rows below which a source is thin: Student's interval of four rows is 1.6 times as wide as that of many."""
FEW_EFFECTIVE = 2.0
"""One row that holds seven tenths of a source's influence leaves two effective rows: the source is then that row."""


class Groups:
    """Sum and spread of the scores of each source."""

    def __init__(self, queries: int, sources: Iterable[str | None] | None) -> None:
        """Make one for `queries` queries; `sources` has that of every example, in order."""
        met: dict[str, int] = {}
        numbers = (met.setdefault(source or NO_SOURCE, len(met)) for source in sources or ())
        self._group = np.fromiter(numbers, np.int32)
        self._names = list(met) if met.keys() - {NO_SOURCE} else []
        self._sizes = np.zeros(len(self._names), dtype=np.int64)
        self._sum = np.zeros((queries, len(self._names)))
        self._squares = np.zeros((queries, len(self._names)))
        self._positive, self._positive_squares = np.zeros_like(self._sum), np.zeros_like(self._sum)

    def add(self, rows: Int[np.ndarray, "row"], scores: Float[np.ndarray, "query row"]) -> None:
        """Add the scores of `rows`; every row may be given once."""
        if not self._names or len(rows) == 0:
            return
        group = self._group[rows]
        order = np.argsort(group, kind="stable")
        present, starts, sizes = np.unique(group[order], return_index=True, return_counts=True)
        values = scores[:, order].astype(np.float64)
        self._sizes[present] += sizes
        self._sum[:, present] += np.add.reduceat(values, starts, axis=1)
        self._squares[:, present] += np.add.reduceat(values**2, starts, axis=1)
        above = np.maximum(values, 0)
        self._positive[:, present] += np.add.reduceat(above, starts, axis=1)
        self._positive_squares[:, present] += np.add.reduceat(above**2, starts, axis=1)

    def records(self, query: int) -> list[GroupRecord]:
        """Return one record for each source that has rows, largest sum first."""
        records = [
            GroupRecord(
                source=name,
                examples=size,
                sum=float(self._sum[query, at]),
                mean=float(self._sum[query, at]) / size,
                **_interval(size, float(self._sum[query, at]), float(self._squares[query, at])),
                positive=float(self._positive[query, at]),
                positive_squares=float(self._positive_squares[query, at]),
            )
            for at, (name, size) in enumerate(zip(self._names, self._sizes.tolist(), strict=True))
            if size
        ]
        return sorted(records, key=lambda record: (-record.sum, record.source))


def _interval(size: int, total: float, squares: float) -> dict[str, float | None]:
    """Return Student's 95% interval of the mean; too narrow when a few examples hold most of the sum."""
    if size == 1:
        return {"low": None, "high": None}
    mean = total / size
    half = student_half_width(size) * (variance_of(size, total, squares) / size) ** 0.5
    return {"low": mean - half, "high": mean + half}


def variance_of(size: int, total: float, squares: float) -> float:
    """Return the sample variance of `size` numbers of which the sum and the sum of squares are known."""
    return max(squares - total**2 / size, 0.0) / (size - 1)


def student_half_width(size: int) -> float:
    """Return the half width of Student's 95% interval of a mean of `size` numbers, in standard errors."""
    from scipy.special import stdtrit  # a tenth of a second, which reading a run does not need

    return float(stdtrit(size - 1, 0.975))


class SourceLift(NamedTuple):
    """The share of one source in the positive scores, beside its share of the rows."""

    source: str
    examples: int
    row_share: float
    """Share of the scored rows, from 0 to 1."""
    influence_share: float
    """Share of the sum of all positive scores, from 0 to 1: the mean over the queries."""
    lift: float
    """Share of influence over share of rows: 1 is what rows of no kind would have."""
    low: float | None
    """Lower end of the 95% interval of the lift, over rows; None for a single row."""
    high: float | None
    thin: bool
    """Whether too few rows carry it for the interval to be trusted: fewer than five, or in effect fewer than two."""


def find_source_lift(scores: "runs.Scores", queries: Sequence[int | str]) -> list[SourceLift]:
    """Return every source with its lift for some queries together: thin ones last, then the highest lift first.

    Each query counts the same, whatever the size of its scores. The interval asks whether other rows of the source
    would do the same; what a run does not list of a row is taken at its most, so it is no narrower than it should be.

    Args:
        scores: An opened run.
        queries: Positions or ids.

    Returns:
        Nothing where the data have no sources, no query has a positive score, or a Vestige that did not record positive
        scores wrote the run.

    Raises:
        UserError: A query is not there.
    """
    names = dict.fromkeys(scores.query_id(query) for query in queries)
    groups = {name: found for name in names if (found := _complete(scores.run.groups.get(name, [])))}
    if not groups:
        return []
    moments = _add_up(scores, groups)
    rows = sum(one.examples for one in moments.values())
    found = [_lift(source, moments, rows) for source in moments]
    return sorted(found, key=lambda one: (one.thin, -one.lift, one.source))


class _Moments(NamedTuple):
    """The positive scores of the rows of one source, each in shares of all influence and added up over the queries."""

    examples: int
    share: float
    squares: float
    """Sum of the squares of the rows' shares; where a row is not listed for every query, the most that it can be."""

    @property
    def variance(self) -> float | None:
        """Variance of the source's share; None for a single row."""
        if self.examples == 1:
            return None
        return self.examples * variance_of(self.examples, self.share, self.squares)


def _complete(groups: Sequence[GroupRecord]) -> list[GroupRecord]:
    """Return the groups, or none where no score is positive or an earlier version did not record the positive ones."""
    known = all(group.positive is not None for group in groups)
    return list(groups) if known and any(group.positive for group in groups) else []


def _add_up(scores: "runs.Scores", groups: Mapping[str, Sequence[GroupRecord]]) -> dict[str, _Moments]:
    """Return the moments of every source.

    The squares need every row's sum over the queries. Listed rows are known, for others the lowest listed score of a
    query is the most that they have; and no sum exceeds that of rows that are alike for all queries.
    """
    share, examples = dict[str, float](), dict[str, int]()
    listed: dict[str, dict[int, float]] = {}
    rest, alike = defaultdict[str, float](float), defaultdict[str, float](float)
    everywhere = 0.0
    for name, found in groups.items():
        weight = 1 / (len(groups) * sum(group.positive or 0.0 for group in found))
        rows = scores.listed(name, "proponent")
        last = weight * max(rows[-1].score, 0.0) if rows else 0.0
        everywhere += last
        held = defaultdict[str, float](float)
        for row in rows:
            if row.score > 0:
                source = row.source or NO_SOURCE
                sums = listed.setdefault(source, {})
                sums[row.row] = sums.get(row.row, 0.0) + weight * row.score - last
                held[source] += (weight * row.score) ** 2
        for group in found:
            source, squares = group.source, weight**2 * (group.positive_squares or 0.0)
            examples[source] = group.examples
            share[source] = share.get(source, 0.0) + weight * (group.positive or 0.0)
            rest[source] += max(squares - held[source], 0.0) ** 0.5
            alike[source] += squares**0.5
    return {
        source: _Moments(
            examples[source],
            share[source],
            min(
                sum((more + everywhere) ** 2 for more in listed.get(source, {}).values()) + rest[source] ** 2,
                alike[source] ** 2,
            ),
        )
        for source in share
    }


def _lift(source: str, moments: Mapping[str, _Moments], rows: int) -> SourceLift:
    own = moments[source]
    row_share, inside = own.examples / rows, own.variance
    low = high = None
    if inside is not None:
        outside = sum(one.variance or 0.0 for name, one in moments.items() if name != source)
        # The share is own / (own + others), and all shares add up to one: its derivatives are 1 - share and -share.
        error = ((1 - own.share) ** 2 * inside + own.share**2 * outside) ** 0.5
        half = student_half_width(own.examples) * error
        low, high = max(own.share - half, 0.0) / row_share, min(own.share + half, 1.0) / row_share
    thin = own.examples < FEW_ROWS or own.share**2 < FEW_EFFECTIVE * own.squares
    return SourceLift(source, own.examples, row_share, own.share, own.share / row_share, low, high, thin)
