"""Groups left out: does the sum of a group's scores predict what the queries lose without it?"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from vestige.errors import DataError
from vestige.evaluate._aligned import Aligned, summed
from vestige.evaluate._statistics import (
    Estimate,
    first_rows,
    grouped_means,
    interval,
    known_mean,
    mean_estimate,
    pearson,
    spearman,
)

FEWEST_GROUPS = 3


class Effects(NamedTuple):
    """What leaving out each group did, and what the scores say it would do."""

    truth: Float[np.ndarray, "group query"]
    """Loss without the group minus loss with everything, means over seeds: positive where the group helps."""
    predicted: Float[np.ndarray, "group query"]
    """Sum of the group's scores."""


class Agreement(NamedTuple):
    """How well predicted and true effects of groups agree."""

    pearson: Estimate
    """Of the effects on all queries together, over groups; interval over queries."""
    spearman: Estimate
    pearson_per_query: Estimate
    """Mean over queries of the correlation over groups; interval over queries."""
    spearman_per_query: Estimate
    undefined: int
    """Queries whose effects do not vary over groups."""


def effects(
    scores: "Aligned | Float[np.ndarray, 'query example']",
    membership: Bool[np.ndarray, "member example"],
    outputs: Float[np.ndarray, "member query"],
    subset: Int[np.ndarray, "member"],
) -> Effects:
    """Return true and predicted effects of the groups that a bank leaves out, in the order of its subsets.

    Which examples a group has is read from what the models were not trained on, never from a position in a list.

    Raises:
        DataError: No model was trained on everything, or there are fewer than three groups.
    """
    truth, left_out = _left_out(membership, outputs, subset)
    return Effects(truth, summed(scores, left_out))


def _left_out(
    membership: Bool[np.ndarray, "member example"],
    outputs: Float[np.ndarray, "member query"],
    subset: Int[np.ndarray, "member"],
) -> tuple[Float[np.ndarray, "group query"], Bool[np.ndarray, "group example"]]:
    """Return the effect of leaving out each group, and which examples it has."""
    trained = first_rows(membership, subset)
    whole = trained.all(1)
    if not whole.any():
        raise DataError(
            "The bank has no model of everything to compare with. Make one with --leave-source-out, --leave-out-lists "
            "or --leave-one-out; for random subsets there is `vestige evaluate lds`."
        )
    if (~whole).sum() < FEWEST_GROUPS:
        raise DataError(
            f"The bank leaves out {int((~whole).sum())} groups; a correlation over groups needs {FEWEST_GROUPS} at "
            "least."
        )
    means = grouped_means(outputs, subset)
    return means[~whole] - means[whole].mean(0), ~trained[~whole]


def agreement(found: Effects, *, draws: int = 1000, seed: int = 0) -> Agreement:
    """Return correlations over groups, with bootstrap intervals over queries.

    Groups are few and are not resampled: the interval says how much rests on these queries, not on these groups.
    """
    truth, predicted = found
    ranks, products = spearman(predicted, truth), pearson(predicted, truth)
    queries = truth.shape[1]
    picked = np.random.default_rng(seed).integers(queries, size=(draws, queries))
    # [group, draw]: the effects on each draw's queries together.
    drawn = [values[:, picked].mean(2) for values in (predicted, truth)]
    together = [values.mean(1, keepdims=True) for values in (predicted, truth)]
    return Agreement(
        _together(pearson(*together), pearson(*drawn), queries),
        _together(spearman(*together), spearman(*drawn), queries),
        mean_estimate(products, draws, seed),
        mean_estimate(ranks, draws, seed),
        int(np.isnan(products).sum()),
    )


def seed_agreement(
    membership: Bool[np.ndarray, "member example"],
    outputs: Float[np.ndarray, "member query"],
    subset: Int[np.ndarray, "member"],
    seeds: Int[np.ndarray, "member"],
) -> float:
    """Return the noise ceiling: mean Pearson correlation of the effects of two seeds, all queries pooled.

    NaN for a single seed.
    """
    runs = np.unique(seeds)
    truths = [
        _left_out(membership[side], outputs[side], subset[side])[0].mean(1, keepdims=True)
        for side in (seeds == run for run in runs)
    ]
    pairs = [pearson(one, other)[0] for place, one in enumerate(truths) for other in truths[:place]]
    return known_mean(np.array(pairs, dtype=np.float64))


def _together(value: np.ndarray, draws: np.ndarray, queries: int) -> Estimate:
    return interval(float(value[0]), draws if queries > 1 else draws[:0])
