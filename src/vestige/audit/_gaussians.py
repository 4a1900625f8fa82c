"""A Gaussian of each example's values over models, its variance drawn towards what is usual."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

FEWEST = 2
"""Models that a Gaussian takes."""


class Gaussians(NamedTuple):
    """Mean and deviation of each example; NaN where fewer than two models are known."""

    mean: Float[np.ndarray, "example"]
    deviation: Float[np.ndarray, "example"]


def gaussians(
    values: Float[np.ndarray, "member example"], chosen: Bool[np.ndarray, "member example"], shrinkage: float
) -> Gaussians:
    """Return the Gaussian of each example's chosen values.

        variance_i = (sum of squares_i + shrinkage * pooled variance) / (models_i - 1 + shrinkage)

    the pooled variance being that of all examples about their own means. A few models say little about the variance of
    one example; `shrinkage` is how many models' worth the others are taken for (Smyth 2004, moderated variances).
    0 leaves every example its own unbiased variance. Values that are not finite are left out.

    Returns:
        NaN where there are fewer than two models, or nothing varies at all.
    """
    chosen = chosen & np.isfinite(values)
    count = chosen.sum(0)
    mean = np.where(chosen, values, 0.0).sum(0) / np.where(count > 0, count, np.nan)
    squares = np.where(chosen, values - np.where(count > 0, mean, 0.0), 0.0) ** 2
    squares, enough = squares.sum(0), count >= FEWEST
    freedom = np.where(enough, count - 1, 0)
    pooled = squares[enough].sum() / freedom.sum() if enough.any() else np.nan
    variance = (squares + shrinkage * pooled) / np.where(enough, freedom + shrinkage, np.nan)
    usable = enough & (variance > 0)
    return Gaussians(np.where(usable, mean, np.nan), np.sqrt(np.where(usable, variance, np.nan)))


def log_density(values: Float[np.ndarray, "example"], of: Gaussians) -> Float[np.ndarray, "example"]:
    """Return the logarithm of the Gaussian density without its constant: finite for values however far out."""
    return -0.5 * ((values - of.mean) / of.deviation) ** 2 - np.log(of.deviation)
