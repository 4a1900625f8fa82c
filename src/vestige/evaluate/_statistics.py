"""Correlations, undefined ones marked, and intervals. Arrays to numbers; uses no model and no file."""

from collections.abc import Callable
from typing import NamedTuple

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


def known_mean(values: Float[np.ndarray, "item"]) -> float:
    """Return the mean of what is not NaN; NaN where nothing is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def interval(value: float, draws: Float[np.ndarray, "draw"]) -> Estimate:
    """Return the value with the percentiles of its bootstrap draws; draws that are NaN are left out."""
    known = draws[np.isfinite(draws)]
    if not np.isfinite(value) or len(known) < 2:
        return Estimate(value, float("nan"), float("nan"))
    low, high = np.quantile(known, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(value, float(low), float(high))


def mean_estimate(values: Float[np.ndarray, "item"], draws: int, seed: int) -> Estimate:
    """Return the mean of the known values, with a bootstrap interval over them; no interval for fewer than two."""
    known = values[~np.isnan(values)]
    if len(known) < 2:
        return Estimate(known_mean(values), float("nan"), float("nan"))
    picked = np.random.default_rng(seed).integers(len(known), size=(draws, len(known)))
    return interval(known_mean(values), known[picked].mean(1))


def resampled(
    statistic: Callable[[np.ndarray, np.ndarray], float], rows: int, columns: int, draws: int, seed: int
) -> Float[np.ndarray, "draw"]:
    """Compute a statistic of rows and columns that are both drawn again, with replacement, for each of `draws`."""
    random = np.random.default_rng(seed)
    return np.array(
        [statistic(random.integers(rows, size=rows), random.integers(columns, size=columns)) for _ in range(draws)]
    )


def grouped_means(values: Float[np.ndarray, "member column"], groups: np.ndarray) -> Float[np.ndarray, "group column"]:
    """Return the mean of the rows of each group, groups in ascending order."""
    return np.stack([values[groups == group].mean(0) for group in np.unique(groups)])


def first_rows(values: Bool[np.ndarray, "member column"], groups: np.ndarray) -> Bool[np.ndarray, "group column"]:
    """Return the first row of each group, groups in ascending order."""
    return values[np.unique(groups, return_index=True)[1]]
