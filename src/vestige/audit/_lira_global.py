"""How often membership of an example can be found out at all, over all models of a bank."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from vestige.audit._lira import SHRINKAGE, lira, lira_of_members


class GlobalLira(NamedTuple):
    """Success of the attack on each example."""

    success: Float[np.ndarray, "example"]
    """Share of the models whose membership is guessed right, 0.5 by chance; NaN where no model can be judged."""
    judged: Int[np.ndarray, "example"]
    """Models that could be."""


def lira_global(
    values: Float[np.ndarray, "member example"],
    membership: Bool[np.ndarray, "member example"],
    *,
    subsets: Int[np.ndarray, "member"] | None = None,
    shrinkage: float = SHRINKAGE,
) -> GlobalLira:
    """Return the share of models that the likelihood ratio puts on the right side, each judged by the others alone.

    Every member takes its turn, the first included. A ratio of exactly 1 counts one half. Arguments as in
    `lira_of_members`.
    """
    return _success(lira_of_members(values, membership, subsets=subsets, shrinkage=shrinkage), membership)


def lira_in_sample(
    values: Float[np.ndarray, "member example"],
    membership: Bool[np.ndarray, "member example"],
    *,
    shrinkage: float = SHRINKAGE,
) -> GlobalLira:
    """Return `lira_global` with every member among its own judges: too high, and useful only to measure by how much."""
    scores = np.stack([lira(row, values, membership, shrinkage=shrinkage).score for row in values])
    return _success(scores, membership)


def _success(scores: np.ndarray, membership: np.ndarray) -> GlobalLira:
    known = ~np.isnan(scores)
    right = np.where(scores == 0, 0.5, (scores > 0) == membership)
    judged = known.sum(0)
    return GlobalLira(np.where(known, right, 0.0).sum(0) / np.where(judged > 0, judged, np.nan), judged)
