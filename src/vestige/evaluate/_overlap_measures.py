"""Whether rankings name different examples for different queries, and whether two methods name the same."""

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from vestige.evaluate._statistics import known_mean

Tops = Sequence[Sequence[int]]
"""Rows of the first examples of each query."""


class Hub(NamedTuple):
    """The example that is in the lists of most queries."""

    row: int
    rate: float
    """Share of the queries."""


def jaccard(one: Sequence[int], other: Sequence[int]) -> float:
    """Return shared examples over all examples of two lists; NaN for two empty ones."""
    first, second = set(one), set(other)
    return len(first & second) / len(first | second) if first | second else float("nan")


def between_queries(tops: Tops) -> float:
    """Return the mean Jaccard index of the lists of two queries; NaN for a single query."""
    pairs = [jaccard(one, other) for one, other in combinations(tops, 2)]
    return known_mean(np.array(pairs, dtype=np.float64))


def by_chance(k: int, examples: int) -> float:
    """Estimate the Jaccard index of two random lists: k^2 / n shared examples of 2 k - k^2 / n."""
    k = min(k, examples)
    shared = k * k / examples
    return shared / (2 * k - shared)


def hub(tops: Tops) -> Hub:
    """Return the example that is in most lists; the first of several."""
    counts = np.bincount(np.concatenate([np.asarray(sorted(set(top)), dtype=np.int64) for top in tops]))
    return Hub(int(counts.argmax()), float(counts.max()) / len(tops))


def cardinality(tops: Tops) -> float:
    """Return distinct examples over filled positions: 1 where no two queries share an example."""
    return len({row for top in tops for row in top}) / sum(len(top) for top in tops)
