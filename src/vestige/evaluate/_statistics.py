"""Correlations, undefined ones marked, and intervals. Arrays to numbers; uses no model and no file."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from scipy.stats import rankdata

CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A number with the ends of its 95 % interval; the ends are NaN where nothing could be resampled."""

    value: float
    low: float
    high: float

    @property
    def is_known(self) -> bool:
        """True if there is a number at all."""
        return bool(np.isfinite(self.value))


def pearson(
    first: Float[np.ndarray, "row column"], second: Float[np.ndarray, "row column"]
) -> Float[np.ndarray, "column"]:
    """Return the correlation of each column of `first` with the same column of `second`.

    NaN where there is nothing to correlate: a side that does not vary, or a value that is not finite.
    """
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    usable = np.isfinite(first).all(0) & np.isfinite(second).all(0)
    # Compared before centring, which leaves rounding where all values are equal.
    usable &= (first != first[:1]).any(0) & (second != second[:1]).any(0)
    first, second = (np.where(usable, values, 0.0) for values in (first, second))
    first, second = first - first.mean(0), second - second.mean(0)
    spread = np.sqrt((first**2).sum(0) * (second**2).sum(0))
    usable &= spread > 0
    return np.where(usable, (first * second).sum(0) / np.where(usable, spread, 1.0), np.nan)


def spearman(
    first: Float[np.ndarray, "row column"], second: Float[np.ndarray, "row column"]
) -> Float[np.ndarray, "column"]:
    """Rank correlation of each column of `first` with the same column of `second`; ties share their mean rank.

    NaN where there is nothing to correlate: a side that does not vary, or a value that is not finite.
    """
    usable = np.isfinite(first).all(0) & np.isfinite(second).all(0)
    ranks = (rankdata(np.where(usable, values, 0.0), axis=0) for values in (first, second))
    return np.where(usable, pearson(*ranks), np.nan)


def mean_of_known(values: Float[np.ndarray, "item"]) -> float:
    """Return the mean of what is not NaN; NaN where nothing is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def make_interval(value: float, draws: Float[np.ndarray, "draw"]) -> Estimate:
    """Return the value with the percentiles of its bootstrap draws; draws that are NaN are left out."""
    known = draws[np.isfinite(draws)]
    if not np.isfinite(value) or len(known) < 2:
        return Estimate(value, float("nan"), float("nan"))
    low, high = np.quantile(known, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(value, float(low), float(high))


def bootstrap(
    statistic: Callable[..., Any], counts: Sequence[int], draws: int, seed: int
) -> Float[np.ndarray, "draw *value"]:
    """Compute a statistic of positions drawn with replacement, `draws` times.

    Args:
        statistic: Takes drawn positions, one array for each of `counts`, as long as its range.
        counts: Sizes of what is drawn again: queries, subsets, seeds.
        draws: How often.
        seed: Of the random numbers.
    """
    random = np.random.default_rng(seed)
    return np.array([statistic(*(random.integers(count, size=count) for count in counts)) for _ in range(draws)])


def estimate_mean(
    values: Float[np.ndarray, "item"], draws: int, seed: int, groups: np.ndarray | None = None
) -> Estimate:
    """Return the mean of the known values with a bootstrap interval; no interval for fewer than two.

    Args:
        values: NaN where nothing is known.
        draws: Of the bootstrap.
        seed: Of the draws.
        groups: Draw whole groups again, not single values: paraphrases of one text are not independent.
    """
    known = ~np.isnan(values)
    mean = mean_of_known(values)
    _, group = np.unique((np.arange(len(values)) if groups is None else groups)[known], return_inverse=True)
    sums, counts = np.bincount(group, values[known]), np.bincount(group)
    if len(counts) < 2:
        return Estimate(mean, float("nan"), float("nan"))
    return make_interval(
        mean, bootstrap(lambda rows: sums[rows].sum() / counts[rows].sum(), [len(counts)], draws, seed)
    )


def mean_by_group(values: Float[np.ndarray, "member column"], groups: np.ndarray) -> Float[np.ndarray, "group column"]:
    """Return the mean of the rows of each group, groups in ascending order."""
    return np.stack([values[groups == group].mean(0) for group in np.unique(groups)])


def first_of_group(values: Bool[np.ndarray, "member column"], groups: np.ndarray) -> Bool[np.ndarray, "group column"]:
    """Return the first row of each group, groups in ascending order."""
    return values[np.unique(groups, return_index=True)[1]]
