"""The linear datamodeling score: do sums of scores rank models trained on subsets as their losses do?"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from vestige.errors import DataError
from vestige.evaluate._aligned import Aligned, blocks_of, summed
from vestige.evaluate._statistics import (
    Estimate,
    first_rows,
    grouped_means,
    interval,
    known_mean,
    resampled,
    spearman,
)

FEWEST_SUBSETS = 3
"""Two subsets correlate perfectly or not at all."""


class Lds(NamedTuple):
    """How well scores predict retraining."""

    estimate: Estimate
    """Mean over queries of the rank correlation over subsets, with a bootstrap interval over queries and subsets."""
    per_query: Float[np.ndarray, "query"]
    """NaN where a query's losses or sums do not vary."""
    undefined: int
    """Queries that were left out for that reason."""
    seeds: tuple[float, ...]
    """The same mean against the models of each seed alone: how much one retraining more or less changes."""


class Ceiling(NamedTuple):
    """How well the retrained models predict each other: no scores can be expected to do better than `whole`."""

    half: float
    """Mean over queries of the rank correlation of one half of the seeds with the other; NaN for a single seed."""
    whole: float
    """What perfect scores would reach against the mean over all seeds: sqrt(2 r / (1 + r)) for r = `half`."""


def datamodeling_score(
    scores: "Aligned | Float[np.ndarray, 'query example']",
    membership: Bool[np.ndarray, "member example"],
    outputs: Float[np.ndarray, "member query"],
    *,
    subset: Int[np.ndarray, "member"] | None = None,
    seeds: Int[np.ndarray, "member"] | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> Lds:
    """Compute the linear datamodeling score (Park et al. 2023, arXiv:2303.14186) of scores against measured losses.

    With the sum `p[s, q]` of a query's scores over the examples of subset `s`, and the mean loss `l[s, q]` of the
    query under the models trained on it, the Spearman correlation over subsets of `p` with `-l`, mean over queries. A
    positive score promises a lower loss, hence the sign.

    Args:
        scores: Positive = training on the example lowers the query's loss. An array, or those of a run on disk.
        membership: True where the model was trained on the example.
        outputs: Loss of each query under each model.
        subset: Which models were trained on the same subset: their losses are averaged. None: each on its own.
        seeds: Which run of its subset each model is, for the spread over seeds.
        draws: Bootstrap draws; 0 for no interval.
        seed: Of the draws.

    Raises:
        DataError: Shapes do not fit, there are fewer than three subsets, or a loss or score is not finite.
    """
    _check(scores, membership, outputs)
    subset = np.arange(len(membership)) if subset is None else subset
    sums = summed(scores, first_rows(membership, subset))
    gains = -grouped_means(outputs, subset)
    if len(gains) < FEWEST_SUBSETS:
        raise DataError(f"The bank has {len(gains)} subsets; a rank correlation needs {FEWEST_SUBSETS} at least.")
    per_query = spearman(sums, gains)

    def again(rows: np.ndarray, columns: np.ndarray) -> float:
        return known_mean(spearman(sums[rows], gains[rows])[columns])

    drawn = resampled(again, len(gains), gains.shape[1], draws, seed) if draws else np.zeros(0)
    return Lds(
        interval(known_mean(per_query), drawn),
        per_query,
        int(np.isnan(per_query).sum()),
        _by_seed(sums, outputs, subset, seeds),
    )


def ceiling(
    outputs: Float[np.ndarray, "member query"],
    subset: Int[np.ndarray, "member"],
    seeds: Int[np.ndarray, "member"],
    *,
    splits: int = 20,
    seed: int = 0,
) -> Ceiling:
    """Estimate what the noise of retraining leaves to be predicted, from splits of the seeds into halves.

    Models of one half of the seeds predict the mean losses of the other half's; an odd seed is left out of a split. The
    correlation r of two halves rises to 2 r / (1 + r) for all seeds (Spearman and Brown), and perfect scores would
    correlate with noisy means at the square root of that.

    Args:
        outputs: Loss of each query under each model.
        subset: Of each model.
        seeds: Which run of its subset each model is.
        splits: How many splits are averaged, where there are as many.
        seed: Of the splits.
    """
    runs = np.unique(seeds)
    half = len(runs) // 2
    if not half:
        return Ceiling(float("nan"), float("nan"))
    random, found = np.random.default_rng(seed), []
    for _ in range(splits if len(runs) > 2 else 1):
        order = random.permutation(runs)
        sides = [np.isin(seeds, order[begin : begin + half]) for begin in (0, half)]
        means = [grouped_means(outputs[side], subset[side]) for side in sides]
        found.append(known_mean(spearman(*means)))
    r = known_mean(np.array(found))
    # Below zero there is only noise, of which no root can be taken.
    return Ceiling(r, float(np.sqrt(2 * r / (1 + r))) if r > 0 else 0.0 if r <= 0 else float("nan"))


def held_out_choice(
    candidates: list[Float[np.ndarray, "query"]], *, share: float = 0.1, seed: int = 0
) -> tuple[int, Int[np.ndarray, "query"]]:
    """Return the candidate that is best on a random share of the queries, and the other queries, to judge it on.

    Args:
        candidates: The correlation of each query, for every candidate.
        share: Of the queries to choose on; one at least.
        seed: Of which queries these are.
    """
    order = np.random.default_rng(seed).permutation(len(candidates[0]))
    count = max(1, round(share * len(order)))
    means = [known_mean(each[order[:count]]) for each in candidates]
    return int(np.nanargmax(np.nan_to_num(means, nan=-np.inf))), np.sort(order[count:])


def _by_seed(
    sums: Float[np.ndarray, "subset query"],
    outputs: Float[np.ndarray, "member query"],
    subset: Int[np.ndarray, "member"],
    seeds: Int[np.ndarray, "member"] | None,
) -> tuple[float, ...]:
    if seeds is None:
        return ()
    numbers = np.searchsorted(np.unique(subset), subset)
    sides = [seeds == run for run in np.unique(seeds)]
    return tuple(known_mean(spearman(sums[numbers[side]], -outputs[side])) for side in sides)


def _check(scores: "Aligned | np.ndarray", membership: np.ndarray, outputs: np.ndarray) -> None:
    expected = (len(membership), scores.shape[0])
    if scores.shape[1] != membership.shape[1] or outputs.shape != expected:
        raise DataError(
            f"Scores of {scores.shape[0]} queries x {scores.shape[1]} examples do not fit models of "
            f"{membership.shape[1]} examples with losses of shape {outputs.shape}; expected {expected}."
        )
    parts = {"scores": (block.scores for block in blocks_of(scores)), "losses": [outputs]}
    for name, blocks in parts.items():
        if broken := sum(int((~np.isfinite(values)).sum()) for values in blocks):
            raise DataError(f"{broken} of the {name} are not finite numbers, so nothing can be ranked by them.")
