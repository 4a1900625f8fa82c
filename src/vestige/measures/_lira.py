"""The likelihood ratio attack: was this model trained on this example, judged by models that were and were not."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from vestige.errors import DataError
from vestige.measures._counterfactual import FEW_MODELS, checked
from vestige.measures._inputs import BankValues, Column
from vestige.measures._registry import Rule, measure

SHRINKAGE = 4.0
_FEWEST = 2
"""Models that a Gaussian takes."""


class Lira(NamedTuple):
    """Evidence that a model was trained on each example, and how many have none."""

    score: Float[np.ndarray, "example"]
    """Above zero, or high, speaks for membership; NaN where it cannot be computed."""
    uncomputable: int
    """Examples without a score: fewer than two models on a side, or a value that is not finite."""


class GlobalLira(NamedTuple):
    """Success of the attack on each example."""

    success: Float[np.ndarray, "example"]
    """Share of the models whose membership is guessed right, 0.5 by chance; NaN where no model can be judged."""
    judged: Int[np.ndarray, "example"]
    """Models that could be."""


class _Gaussians(NamedTuple):
    """Mean and deviation of each example; NaN where fewer than two models are known."""

    mean: Float[np.ndarray, "example"]
    deviation: Float[np.ndarray, "example"]


def lira(
    target: Float[np.ndarray, "example"],
    values: Float[np.ndarray, "member example"],
    membership: Bool[np.ndarray, "member example"],
    *,
    left_out: Bool[np.ndarray, "member"] | None = None,
    shrinkage: float = SHRINKAGE,
) -> Lira:
    """Return the log-likelihood ratio of the target's values, trained on each example against not trained on it.

        log N(g; mu_in, sigma_in) - log N(g; mu_out, sigma_out)

    Carlini et al. 2022, "Membership inference attacks from first principles", online form. In log space: a value at
    1,000 deviations has a finite score, and nothing is clamped.

    Args:
        target: Value of each example under the model in question, at whichever checkpoint.
        values: The same under the bank's models; they rise as an example is known better. Margins and gaps are closest
            to Gaussian.
        membership: True where the member was trained on the example.
        left_out: Members that must not take part: the target itself, and others trained on the same subset.
        shrinkage: Weight of the pooled variance, in models.

    Raises:
        DataError: Shapes that do not agree.
    """
    values, target, taken = _prepared(target, values, membership, left_out)
    inside = _gaussians(values, membership & taken, shrinkage)
    outside = _gaussians(values, ~membership & taken, shrinkage)
    return _counted(_log_density(target, inside) - _log_density(target, outside))


def lira_offline(
    target: Float[np.ndarray, "example"],
    values: Float[np.ndarray, "member example"],
    membership: Bool[np.ndarray, "member example"],
    *,
    left_out: Bool[np.ndarray, "member"] | None = None,
    shrinkage: float = SHRINKAGE,
) -> Lira:
    """Return how surprising the target's values are for models that were not trained on the example, nats.

        -log P(Z > g), Z ~ N(mu_out, sigma_out)

    The offline form of Carlini et al. 2022: it needs no model that was trained on the examples. Between 0 and infinity;
    0.69 is what such a model has in the middle. Arguments as in `lira`.

    Raises:
        DataError: Shapes that do not agree.
    """
    from scipy.stats import norm

    values, target, taken = _prepared(target, values, membership, left_out)
    outside = _gaussians(values, ~membership & taken, shrinkage)
    return _counted(-np.asarray(norm.logsf((target - outside.mean) / outside.deviation), dtype=np.float64))


def lira_of_members(
    values: Float[np.ndarray, "member example"],
    membership: Bool[np.ndarray, "member example"],
    *,
    subsets: Int[np.ndarray, "member"] | None = None,
    shrinkage: float = SHRINKAGE,
) -> Float[np.ndarray, "member example"]:
    """Return every member's score as the target, by the other members alone; NaN where it cannot be computed.

    Args:
        values: As in `lira`.
        membership: As in `lira`.
        subsets: Number of the subset of each member: all members of the target's subset are left out with it. Without
            it, only the target.
        shrinkage: As in `lira`.

    Raises:
        DataError: Shapes that do not agree.
    """
    groups = np.arange(len(values)) if subsets is None else np.asarray(subsets)
    rows = [
        lira(row, values, membership, left_out=groups == group, shrinkage=shrinkage).score
        for row, group in zip(values, groups, strict=True)
    ]
    return np.stack(rows) if rows else np.zeros_like(values, dtype=np.float64)


def _prepared(
    target: np.ndarray, values: np.ndarray, membership: np.ndarray, left_out: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    values, target = checked(values, membership), np.asarray(target, dtype=np.float64)
    if target.shape != values.shape[1:]:
        raise DataError(f"The target has {target.shape} values, the bank's members {values.shape[1:]}.")
    if left_out is not None and left_out.shape != values.shape[:1]:
        raise DataError(f"left_out has {left_out.shape} entries for {len(values)} members.")
    taken = np.ones(len(values), dtype=bool) if left_out is None else ~left_out
    return values, np.where(np.isfinite(target), target, np.nan), taken[:, None]


def _counted(score: np.ndarray) -> Lira:
    return Lira(score, int(np.isnan(score).sum()))


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


def _gaussians(
    values: Float[np.ndarray, "member example"], chosen: Bool[np.ndarray, "member example"], shrinkage: float
) -> _Gaussians:
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
    squares, enough = squares.sum(0), count >= _FEWEST
    freedom = np.where(enough, count - 1, 0)
    pooled = squares[enough].sum() / freedom.sum() if enough.any() else np.nan
    variance = (squares + shrinkage * pooled) / np.where(enough, freedom + shrinkage, np.nan)
    usable = enough & (variance > 0)
    return _Gaussians(np.where(usable, mean, np.nan), np.sqrt(np.where(usable, variance, np.nan)))


def _log_density(values: Float[np.ndarray, "example"], of: _Gaussians) -> Float[np.ndarray, "example"]:
    """Return the logarithm of the Gaussian density without its constant: finite for values however far out."""
    return -0.5 * ((values - of.mean) / of.deviation) ** 2 - np.log(of.deviation)


@measure(
    "lira",
    "log-likelihood ratio of trained on it against not trained on it",
    stage="each model and the bank",
    needs=("bank",),
    sign=1,
    early_sign=1,
    missing=FEW_MODELS,
    cost="a bank of trained models; then nothing",
    limits="holds for models trained as the bank's were; a few models give wide ratios",
    rule=Rule(0.0, "members"),
    order=190,
    curve=20,
    over_time=True,
)
def _lira(bank: BankValues) -> Column:
    return lira(bank.target, bank.values, bank.membership, left_out=bank.left_out).score


@measure(
    "lira_offline",
    "surprise for models that were not trained on it",
    stage="each model and the bank",
    needs=("bank",),
    sign=1,
    early_sign=1,
    missing=FEW_MODELS,
    cost="a bank of trained models; then nothing",
    limits="weaker than lira: it does not know what being trained on the example does",
    order=200,
)
def _lira_offline(bank: BankValues) -> Column:
    return lira_offline(bank.target, bank.values, bank.membership, left_out=bank.left_out).score


@measure(
    "lira_global",
    "membership accuracy over the bank's models",
    stage="bank",
    needs=("bank",),
    sign=1,
    early_sign=1,
    missing=FEW_MODELS,
    cost="a bank of trained models; then a likelihood ratio for each of them",
    limits="about models like these, not about the one under audit",
    order=210,
)
def _lira_global(bank: BankValues) -> Column:
    return lira_global(bank.values, bank.membership, subsets=bank.subsets).success
