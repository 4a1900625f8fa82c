"""Which sources hold more of the influence than of the rows: for one query, or for several together."""

from collections.abc import Sequence
from typing import NamedTuple

from vestige.runs._record import GroupRecord
from vestige.runs._scores import Scores
from vestige.runs._summary import student_half_width, variance_of

FEW_ROWS = 5
"""Rows below which a source is thin: Student's interval of four rows is 1.6 times as wide as that of many."""
FEW_EFFECTIVE = 2.0
"""One row that holds seven tenths of a source's influence leaves two effective rows: the source is then that row."""


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


def find_source_lift(scores: Scores, queries: Sequence[int | str]) -> list[SourceLift]:
    """Return every source with its lift for some queries together: thin ones last, then the highest lift first.

    Each query counts the same, whatever the size of its scores. The interval asks whether other rows of the source
    would do the same; over several queries it is at its widest, as if a row were alike for all of them.

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
    groups = [_complete(scores.run.groups.get(name, [])) for name in names]
    groups = [found for found in groups if any(group.positive for group in found)]
    if not groups:
        return []
    parts = [[_share(group, found) for group in found] for found in groups]
    found = [_combine([part for query in parts for part in query if part.source == name]) for name in _sources(parts)]
    return sorted(found, key=lambda one: (one.thin, -one.lift, one.source))


class _Part(NamedTuple):
    """The share of one source, for one query."""

    source: str
    examples: int
    row_share: float
    share: float
    error: float | None
    """Standard error of the share; None for a single row."""
    effective: float


def _complete(groups: Sequence[GroupRecord]) -> list[GroupRecord]:
    return [] if any(group.positive is None for group in groups) else list(groups)


def _sources(parts: Sequence[Sequence[_Part]]) -> list[str]:
    return list(dict.fromkeys(part.source for query in parts for part in query))


def _share(group: GroupRecord, groups: Sequence[GroupRecord]) -> _Part:
    """Return the share of a source, with the standard error that the spread of its and all other rows leads to."""
    total, rows = sum(each.positive or 0.0 for each in groups), sum(each.examples for each in groups)
    own, squares = group.positive or 0.0, group.positive_squares or 0.0
    share = own / total
    inside = _variance(group)
    outside = sum(_variance(each) or 0.0 for each in groups if each is not group)
    # The share is own / (own + others): its derivatives are (1 - share) / total and -share / total.
    error = None if inside is None else ((1 - share) ** 2 * inside + share**2 * outside) ** 0.5 / total
    effective = own**2 / squares if squares else 0.0
    return _Part(group.source, group.examples, group.examples / rows, share, error, effective)


def _variance(group: GroupRecord) -> float | None:
    """Return the variance of the sum of positive scores of a source; None for a single row."""
    if group.examples == 1:
        return None
    return group.examples * variance_of(group.examples, group.positive or 0.0, group.positive_squares or 0.0)


def _combine(parts: Sequence[_Part]) -> SourceLift:
    """Return the lift of a source over several queries."""
    source, examples, row_share = parts[0][:3]
    share = sum(part.share for part in parts) / len(parts)
    effective = sum(part.effective for part in parts) / len(parts)
    errors = [part.error for part in parts if part.error is not None]
    low = high = None
    if errors:
        half = student_half_width(examples) * sum(errors) / len(errors)
        low, high = max(share - half, 0.0) / row_share, min(share + half, 1.0) / row_share
    thin = examples < FEW_ROWS or effective < FEW_EFFECTIVE
    return SourceLift(source, examples, row_share, share, share / row_share, low, high, thin)
