"""What a bank of models shows about examples: counterfactual memorization, simplicity, and likelihood ratios (LiRA)."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from vestige import banks
from vestige.errors import DataError
from vestige.measures._measure import BankValues, Column, Rule, measure

Values = Float[np.ndarray, "member example"]
Membership = Bool[np.ndarray, "member example"]
Members = Bool[np.ndarray, "member"]
Subsets = Int[np.ndarray, "member"]


def counterfactual(values: Values, membership: Membership) -> Column:
    """Return the mean value of the models trained on an example minus that of the others; high is memorized.

    Zhang et al. 2023, "Counterfactual memorization in neural language models"; Feldman and Zhang 2020.

    Args:
        values: That rise as a model learns an example better: margins, gaps, or minus the losses. Those that are not
            finite are left out.
        membership: True where the member was trained on the example.

    Returns:
        NaN where one of the two sides has no model.

    Raises:
        DataError: The arrays differ in shape.
    """
    inside, outside = _side_means(values, membership)
    return inside - outside


def simplicity(values: Values, membership: Membership) -> Column:
    """Return the mean value of the models trained on an example plus that of the others; high is easy.

    Arguments, errors and NaN as in `counterfactual`, of which it is the other half.
    """
    inside, outside = _side_means(values, membership)
    return inside + outside


class Lira(NamedTuple):
    """Evidence that a model was trained on each example, and how many have none."""

    score: Column
    """Above zero, or high, speaks for membership; NaN where it cannot be computed."""
    uncomputable: int
    """Examples without a score: fewer than two models on a side, or a value that is not finite."""


class GlobalLira(NamedTuple):
    """Success of the attack on each example."""

    success: Column
    """Share of the models whose membership is guessed right, 0.5 by chance; NaN where no model can be judged."""
    judged: Int[np.ndarray, "example"]
    """Models that could be."""


def lira(
    target: Column, values: Values, membership: Membership, *, left_out: Members | None = None, shrinkage: float = 4.0
) -> Lira:
    """Return the log-likelihood ratio of the target's values, trained on each example against not trained on it.

        log N(g; mu_in, sigma_in) - log N(g; mu_out, sigma_out)

    Carlini et al. 2022, "Membership inference attacks from first principles", online form. In log space: a value at
    1,000 deviations has a finite score, and nothing is clamped.

    Args:
        target: Value of each example under the model in question, at whichever checkpoint.
        values: The same under the bank's models; they rise as an example is learned better. Margins and gaps are
            closest to Gaussian.
        membership: True where the member was trained on the example.
        left_out: Members that must not take part: the target itself, and others trained on the same subset.
        shrinkage: Weight of the pooled variance, in models.

    Raises:
        DataError: Shapes that do not agree.
    """
    values, target, judges = _check_target(target, values, membership, left_out)
    inside = _fit_gaussians(values, membership & judges, shrinkage)
    outside = _fit_gaussians(values, ~membership & judges, shrinkage)
    score = _log_density(target, *inside) - _log_density(target, *outside)
    return Lira(score, int(np.isnan(score).sum()))


def lira_offline(
    target: Column, values: Values, membership: Membership, *, left_out: Members | None = None, shrinkage: float = 4.0
) -> Lira:
    """Return how surprising the target's values are for models that were not trained on the example, nats.

        -log P(Z > g), Z ~ N(mu_out, sigma_out)

    The offline form of Carlini et al. 2022: it needs no model that was trained on the examples. Between 0 and infinity;
    0.69 is what such a model has in the middle. Arguments and errors as in `lira`.
    """
    from scipy.stats import norm

    values, target, judges = _check_target(target, values, membership, left_out)
    mean, deviation = _fit_gaussians(values, ~membership & judges, shrinkage)
    score = -np.asarray(norm.logsf((target - mean) / deviation), dtype=np.float64)
    return Lira(score, int(np.isnan(score).sum()))


def lira_of_members(
    values: Values, membership: Membership, *, subsets: Subsets | None = None, shrinkage: float = 4.0
) -> Values:
    """Return every member's score as the target, by the other members alone; NaN where it cannot be computed.

    All members of the target's subset are left out with it; without `subsets`, only the target. Other arguments and
    errors as in `lira`.
    """
    groups = np.arange(len(values)) if subsets is None else np.asarray(subsets)
    rows = [
        lira(row, values, membership, left_out=groups == group, shrinkage=shrinkage).score
        for row, group in zip(values, groups, strict=True)
    ]
    return np.stack(rows) if rows else np.zeros_like(values, dtype=np.float64)


def lira_global(
    values: Values, membership: Membership, *, subsets: Subsets | None = None, shrinkage: float = 4.0
) -> GlobalLira:
    """Return the share of models that the likelihood ratio puts on the right side, each judged by the others alone.

    Every member takes its turn, the first included. A ratio of exactly 1 counts one half. Arguments as in
    `lira_of_members`.
    """
    return _count_successes(lira_of_members(values, membership, subsets=subsets, shrinkage=shrinkage), membership)


def lira_in_sample(values: Values, membership: Membership, *, shrinkage: float = 4.0) -> GlobalLira:
    """Return `lira_global` with every member among its own judges: too high, and useful only to measure by how much."""
    scores = np.stack([lira(row, values, membership, shrinkage=shrinkage).score for row in values])
    return _count_successes(scores, membership)


class BankEvidence(NamedTuple):
    """What the models of a bank say about each example, ids in the order of `Bank.example_ids`."""

    counterfactual: Column
    simplicity: Column
    lira: Values
    """Of each member as the target, those of its subset left out."""
    success: GlobalLira
    uncomputable: int
    """Pairs of a member and an example that have no likelihood ratio."""


def bank_evidence(
    bank: banks.Bank,
    *,
    of: Literal["margin", "gap", "loss"] = "margin",
    shrinkage: float = 4.0,
    membership: Membership | None = None,
) -> BankEvidence:
    """Compute counterfactual memorization, simplicity and likelihood ratios of all examples of a bank.

    Args:
        bank: Of random subsets, with what each member makes of the examples.
        of: The value that they are taken from. Losses count with their sign turned, so that all of them rise.
        shrinkage: As in `lira`.
        membership: True where the member was trained on the example or on a copy of it; the bank's own if not given.

    Raises:
        DataError: The bank does not hold that value.
    """
    values = bank.values(f"example_{of}")
    values = -values if of == "loss" else values
    inside = bank.membership if membership is None else membership
    scores = lira_of_members(values, inside, subsets=bank.subsets, shrinkage=shrinkage)
    return BankEvidence(
        counterfactual(values, inside),
        simplicity(values, inside),
        scores,
        _count_successes(scores, inside),
        int(np.isnan(scores).sum()),
    )


def mean_over_models(values: Values) -> tuple[Column, Column]:
    """Return mean and standard deviation (population form) of each example's value over all models, finite ones alone.

    The published static loss and logit gap (Dentan et al. 2024): what models like these make of an example, whether or
    not they were trained on it.
    """
    chosen = np.isfinite(values)
    mean = _mean(values, chosen)
    return mean, np.sqrt(_mean((values - mean) ** 2, chosen))


def _check_values(values: Values, membership: Membership) -> Values:
    """Return the values in float64; raise unless there is one for each member and example."""
    if values.ndim != 2 or values.shape != membership.shape or membership.dtype != np.bool_:
        raise DataError(
            f"Values {values.shape} and membership {membership.shape} of {membership.dtype}: both must be [member, "
            "example], membership of bool. `Bank.open(folder)` has `example_margins` and `membership`."
        )
    return np.asarray(values, dtype=np.float64)


def _check_target(
    target: Column, values: Values, membership: Membership, left_out: Members | None
) -> tuple[Values, Column, Bool[np.ndarray, "member 1"]]:
    """Return values and target in float64, NaN where the target is not finite, and which members take part."""
    values, target = _check_values(values, membership), np.asarray(target, dtype=np.float64)
    if target.shape != values.shape[1:]:
        raise DataError(f"The target has {target.shape} values, the bank's members {values.shape[1:]}.")
    if left_out is not None and left_out.shape != values.shape[:1]:
        raise DataError(f"left_out has {left_out.shape} entries for {len(values)} members.")
    judges = np.ones(len(values), dtype=bool) if left_out is None else ~left_out
    return values, np.where(np.isfinite(target), target, np.nan), judges[:, None]


def _side_means(values: Values, membership: Membership) -> tuple[Column, Column]:
    values = _check_values(values, membership)
    return _mean(values, membership & np.isfinite(values)), _mean(values, ~membership & np.isfinite(values))


def _mean(values: Values, chosen: Membership) -> Column:
    """Return the mean of each example's chosen values; NaN without any."""
    count = chosen.sum(0)
    return np.where(chosen, values, 0.0).sum(0) / np.where(count > 0, count, np.nan)


def _count_successes(scores: Values, membership: Membership) -> GlobalLira:
    known = ~np.isnan(scores)
    right = np.where(scores == 0, 0.5, (scores > 0) == membership)
    return GlobalLira(_mean(right, known), known.sum(0))


def _fit_gaussians(values: Values, chosen: Membership, shrinkage: float) -> tuple[Column, Column]:
    """Return mean and deviation of each example's chosen values; NaN for fewer than two, or if nothing varies at all.

        variance_i = (sum of squares_i + shrinkage * pooled variance) / (models_i - 1 + shrinkage)

    the pooled variance being that of all examples about their own means. A few models say little about the variance of
    one example; `shrinkage` is how many models' worth the others are taken for (Smyth 2004, moderated variances).
    0 leaves every example its own unbiased variance. Values that are not finite are left out.
    """
    chosen = chosen & np.isfinite(values)
    count, mean = chosen.sum(0), _mean(values, chosen)
    squares = np.where(chosen, values - np.where(count > 0, mean, 0.0), 0.0) ** 2
    squares, enough = squares.sum(0), count >= 2
    freedom = np.where(enough, count - 1, 0)
    pooled = squares[enough].sum() / freedom.sum() if enough.any() else np.nan
    variance = (squares + shrinkage * pooled) / np.where(enough, freedom + shrinkage, np.nan)
    usable = enough & (variance > 0)
    return np.where(usable, mean, np.nan), np.sqrt(np.where(usable, variance, np.nan))


def _log_density(values: Column, mean: Column, deviation: Column) -> Column:
    """Return the logarithm of the Gaussian density without its constant: finite for values however far out."""
    return -0.5 * ((values - mean) / deviation) ** 2 - np.log(deviation)


_OF_A_BANK: dict[str, Any] = {
    "needs": ("bank",),
    "cost": "a bank of trained models; then nothing",
    "missing": "fewer than two models of the bank with or without the example and its copies, or it is not in the bank",
}
_MEMORIZED: dict[str, Any] = {**_OF_A_BANK, "sign": 1, "early_sign": 1}


@measure(
    "counterfactual",
    "mean over models trained on the example minus mean over those that were not",
    stage="bank",
    limits="about models like these, not about the one under audit",
    order=170,
    curve=50,
    **_MEMORIZED,
)
def _counterfactual(bank: BankValues) -> Column:
    return counterfactual(bank.values, bank.membership)


@measure(
    "simplicity",
    "sum of the same two means",
    stage="bank",
    high="easy anyway",
    limits="says how easy an example is, not whether it is memorized",
    order=180,
    **_OF_A_BANK,
)
def _simplicity(bank: BankValues) -> Column:
    return simplicity(bank.values, bank.membership)


@measure(
    "bank_mean",
    "mean over all models of the bank, of what they compare (--bank-value; minus the loss)",
    stage="bank",
    high="easy anyway",
    details=("std",),
    detail="standard deviation over the models ({})",
    limits="says how easy an example is for models like these, not whether it is memorized",
    order=185,
    **_OF_A_BANK,
)
def _bank_mean(bank: BankValues) -> dict[str, Column]:
    return dict(zip(("bank_mean", "bank_mean_std"), mean_over_models(bank.values), strict=True))


@measure(
    "lira",
    "log-likelihood ratio of trained on it against not trained on it",
    stage="each model and the bank",
    limits="holds for models trained as the bank's were; a few models give wide ratios",
    rule=Rule(0.0, "members"),
    order=190,
    curve=20,
    over_time=True,
    **_MEMORIZED,
)
def _lira(bank: BankValues) -> Column:
    return lira(bank.target, bank.values, bank.membership, left_out=bank.left_out).score


@measure(
    "lira_offline",
    "surprise for models that were not trained on it",
    stage="each model and the bank",
    limits="weaker than lira: it does not know what being trained on the example does",
    order=200,
    **_MEMORIZED,
)
def _lira_offline(bank: BankValues) -> Column:
    return lira_offline(bank.target, bank.values, bank.membership, left_out=bank.left_out).score


@measure(
    "lira_global",
    "membership accuracy over the bank's models",
    stage="bank",
    limits="about models like these, not about the one under audit",
    order=210,
    **_MEMORIZED | {"cost": "a bank of trained models; then a likelihood ratio for each of them"},
)
def _lira_global(bank: BankValues) -> Column:
    return lira_global(bank.values, bank.membership, subsets=bank.subsets).success
