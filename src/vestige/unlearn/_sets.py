"""Sets of examples that are unlearnt or measured as one, and sources with the same content."""

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from vestige.data import TokenizedData
from vestige.errors import DataError

NO_SOURCE = "(no source)"
REDUNDANT = 0.5
"""Half of a source's word sequences are in another one: leaving one of the two out then changes little, although each
scores as if it were alone."""
_WINDOW = 8
_SHINGLES = 200_000
"""Sequences compared per source: enough for a share to within a percent."""


class ExampleSet(NamedTuple):
    """Rows of a data set under one name."""

    name: str
    rows: Int[np.ndarray, "row"]


class Overlap(NamedTuple):
    """Two sources and how much of the smaller one is in the larger one."""

    one: str
    other: str
    share: float


def training_sources(data: TokenizedData, samples: int) -> list[ExampleSet]:
    """Return the sources of the training data, by name, each with at most `samples` rows spread evenly over it.

    Raises:
        DataError: There are fewer than two, so nothing to compare.
    """
    names = [example.source or NO_SOURCE for example in data.examples]
    found = [ExampleSet(name, _spread(_useful(data, names, name), samples)) for name in sorted(set(names))]
    found = [each for each in found if len(each.rows)]
    if len(found) < 2:
        raise DataError(
            f"{data.name} has {len(found)} source{'' if len(found) == 1 else 's'} of text, and sources are to be "
            "compared. Give the examples a `source` column, or type --level example to score each of them."
        )
    return found


def single_examples(data: TokenizedData) -> list[ExampleSet]:
    """Return every example as a set of its own, under its id."""
    return [ExampleSet(example.id, np.array([row])) for row, example in enumerate(data.examples)]


def test_sets(queries: TokenizedData) -> list[ExampleSet]:
    """Return the queries of each source as a set, in order of appearance; one without a source by itself, under its id.

    Raises:
        DataError: A set has no target token, or an id is also the name of a source.
    """
    members: dict[str, list[int]] = {}
    for row, example in enumerate(queries.examples):
        if example.source is None and example.id in members:
            raise DataError(f"The query {example.id!r} has the name of another test set. Give it another `id`.")
        members.setdefault(example.source or example.id, []).append(row)
    counts = queries.target_counts
    for name, rows in members.items():
        if not counts[rows].any():
            raise DataError(
                f"The test set {name!r} has no token to explain: expected a `text`, or a `prompt` with a `completion`."
            )
    return [ExampleSet(name, np.array(rows)) for name, rows in members.items()]


def set_means(
    values: Float[np.ndarray, "... example"], weights: Float[np.ndarray, "example"], sets: Sequence[ExampleSet]
) -> Float[np.ndarray, "... set"]:
    """Return the sum of the values of each set over the sum of its weights: exact, not a mean of means."""
    return np.stack([values[..., each.rows].sum(-1) / weights[each.rows].sum() for each in sets], axis=-1)


def overlaps(data: TokenizedData, sources: Sequence[ExampleSet]) -> list[Overlap]:
    """Return pairs of sources of which the smaller one is at least half in the larger, most alike first.

    Compared are all sequences of eight tokens (whole examples where they are shorter), or for large sources those with
    the smallest hashes, which are the same ones in every source.
    """
    shingles = {each.name: _shingles(data, each.rows) for each in sources}
    found = []
    for one, other in combinations(shingles, 2):
        left, right = _comparable(shingles[one], shingles[other])
        if size := min(len(left), len(right)):
            found.append(Overlap(one, other, len(np.intersect1d(left, right, assume_unique=True)) / size))
    return sorted((each for each in found if each.share >= REDUNDANT), key=lambda each: -each.share)


def _useful(data: TokenizedData, names: Sequence[str], name: str) -> Int[np.ndarray, "row"]:
    counts = data.target_counts
    return np.array([row for row, own in enumerate(names) if own == name and counts[row]], dtype=np.int64)


def _spread(rows: Int[np.ndarray, "row"], most: int) -> Int[np.ndarray, "row"]:
    return rows if len(rows) <= most else rows[np.linspace(0, len(rows) - 1, most).round().astype(np.int64)]


def _shingles(data: TokenizedData, rows: Int[np.ndarray, "row"]) -> np.ndarray:
    """Return hashes of the token sequences of a source, distinct and ascending, at most `_SHINGLES` of them."""
    found = [_hashes(data.input_ids[row]) for row in rows]
    return np.unique(np.concatenate(found))[:_SHINGLES]


def _hashes(tokens: np.ndarray) -> np.ndarray:
    width = min(_WINDOW, len(tokens))
    if not width:
        return np.zeros(0, dtype=np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(tokens.astype(np.uint64) + np.uint64(1), width)
    code = np.full(len(windows), width, dtype=np.uint64)
    for column in range(width):
        # The mixing of splitmix64, whose products wrap around on purpose.
        code = (code ^ windows[:, column]) * np.uint64(0x9E3779B97F4A7C15)
        code ^= code >> np.uint64(29)
    return code


def _comparable(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return what both would hold had they been cut at the same hash."""
    last = min((each[-1] for each in (left, right) if len(each) == _SHINGLES), default=None)
    return (left, right) if last is None else (left[left <= last], right[right <= last])
