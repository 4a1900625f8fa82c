"""Robust membership inference (RMIA): how far a model's probability stands out, compared with that of other texts."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Bool

from vestige.errors import DataError, SpecError
from vestige.measures._attack import Mask
from vestige.measures._bank_measures import Members, Membership, Values
from vestige.measures._measure import BankValues, Column, Losses, measure


def rmia(
    target: Column,
    values: Values,
    membership: Membership,
    *,
    left_out: Members | None = None,
    population: Mask | None = None,
    ratio: float = 1.0,
) -> Column:
    """Return the share of other examples over which each stands out under the target; high speaks for membership.

        score(x) = share of z with  (p(x) / P(x)) / (p(z) / P(z)) >= ratio
        P(x) = (mean p of models trained on x + mean p of models that were not) / 2

    Zarifzadeh et al. 2024, "Low-cost high-power membership inference attacks", online form. p is a probability: here
    the geometric mean of the target tokens' probabilities, exp(-mean loss), for a whole text's is too small to be
    compared. For one target the score ranks examples as p(x) / P(x) does; the z put different targets on one scale.

    Args:
        target: log p of each example under the model in question, nats.
        values: The same under the reference models, such as those of a bank.
        membership: True where a reference model was trained on the example.
        left_out: Reference models that must not take part: the target itself, and others trained on the same subset.
        population: The examples z; not given, all of them. An example is not compared with itself.
        ratio: The published experiments take 1 to 2; texts differ by less than classes of images do.

    Returns:
        0 to 1; NaN where no model was trained on the example, or all were, or a value is not finite.

    Raises:
        DataError: Shapes that do not agree, or log-probabilities above zero.
        SpecError: A ratio of 0 or less.
    """
    target, values, judges = _check(target, values, membership, left_out)
    inside, outside = (_log_mean(values, side & judges) for side in (membership, ~membership))
    with np.errstate(invalid="ignore"):
        reference = np.logaddexp(inside, outside) - np.log(2)
    return _stand_out(target - reference, population, ratio)


def rmia_offline(
    target: Column,
    values: Values,
    membership: Membership | None = None,
    *,
    left_out: Members | None = None,
    population: Mask | None = None,
    ratio: float = 1.0,
    slope: float = 1.0,
) -> Column:
    """Return the same from models that were not trained on the example; one reference model will do.

        P(x) = ((1 + slope) mean p of models without x + 1 - slope) / 2

    which takes the mean p of models with x for slope * (mean p without x) + 1 - slope. The paper finds the slope with
    pairs of reference models, as `fit_slope` does: about 0.3 for classifiers of images, whose members reach
    probabilities near 1. With 1, the reference is taken as it is. Other arguments, values and errors as in `rmia`.

    Args:
        target: As in `rmia`.
        values: As in `rmia`.
        membership: Not given, no reference model was trained on any of the examples.
        left_out: As in `rmia`.
        population: As in `rmia`.
        ratio: As in `rmia`.
        slope: 0 to 1.
    """
    if not 0 <= slope <= 1:
        raise SpecError(f"slope={slope}: give a number from 0 to 1.")
    membership = np.zeros(values.shape, dtype=bool) if membership is None else membership
    target, values, judges = _check(target, values, membership, left_out)
    outside = _log_mean(values, ~membership & judges)
    with np.errstate(divide="ignore", invalid="ignore"):
        reference = np.logaddexp(np.log1p(slope) + outside, np.log(1 - slope)) - np.log(2)
    return _stand_out(target - reference, population, ratio)


def fit_slope(values: Values, membership: Membership) -> float:
    """Return the slope of `rmia_offline`, by least squares of 1 - p with the example on 1 - p without it, 0 to 1.

    Examples without a model on either side do not count; 1 where none is left. Arguments and errors as in `rmia`.
    """
    _, values, _ = _check(np.zeros(values.shape[1:]), values, membership, None)
    inside, outside = (-np.expm1(_log_mean(values, side)) for side in (membership, ~membership))
    known = np.isfinite(inside) & np.isfinite(outside)
    total = float((outside[known] ** 2).sum())
    return float(np.clip((inside[known] * outside[known]).sum() / total, 0, 1)) if total > 0 else 1.0


def _check(
    target: Column, values: Values, membership: Membership, left_out: Members | None
) -> tuple[Column, Values, Bool[np.ndarray, "member 1"]]:
    """Return log-probabilities in float64, NaN for what is not finite, and which models take part."""
    if values.ndim != 2 or values.shape != membership.shape or target.shape != values.shape[1:]:
        raise DataError(
            f"target {target.shape}, values {values.shape} and membership {membership.shape}: give log-probabilities "
            "[example] and [member, example], and membership [member, example]."
        )
    if left_out is not None and left_out.shape != values.shape[:1]:
        raise DataError(f"left_out has {left_out.shape} entries for {len(values)} models.")
    found = [np.where(np.isfinite(each), each, np.nan).astype(np.float64) for each in (target, values)]
    # Rounding may put the logarithm of a probability of 1 a little above zero.
    if any((each > 1e-6).any() for each in found):
        raise DataError("Log-probabilities lie at or below zero: give minus the mean loss of each example.")
    judges = np.ones(len(values), dtype=bool) if left_out is None else ~left_out
    return found[0], found[1], judges[:, None]


def _log_mean(values: Values, chosen: Membership) -> Column:
    """Return the logarithm of the mean of exp(value) over the chosen models that have a value; NaN without any."""
    from scipy.special import logsumexp

    chosen = chosen & ~np.isnan(values)
    count = chosen.sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        total = logsumexp(np.where(chosen, values, -np.inf), axis=0)
        return np.where(count > 0, total - np.log(count), np.nan)


def _stand_out(log_ratio: Column, population: Mask | None, ratio: float) -> Column:
    """Return the share of the population that each example beats by `ratio` at least."""
    if ratio <= 0:
        raise SpecError(f"ratio={ratio}: give a number above 0.")
    known = ~np.isnan(log_ratio)
    others = known if population is None else known & population
    barrier = log_ratio - np.log(ratio)
    beaten = np.searchsorted(np.sort(log_ratio[others]), barrier, side="right").astype(np.float64)
    beaten -= others & (log_ratio <= barrier)  # itself
    count = others.sum() - others.astype(np.float64)
    return np.where(known & (count > 0), beaten / np.maximum(count, 1), np.nan)


_NO_PROBABILITY = "--bank-value gap is no probability"
_OF_A_BANK: dict[str, Any] = {
    "stage": "each model and the bank",
    "needs": ("bank",),
    "sign": 1,
    "early_sign": 1,
    "relative": True,
    "cost": "a bank of trained models; then nothing",
    "missing": lambda job: (
        _NO_PROBABILITY
        if job.settings.bank_value == "gap"
        else "no model of the bank with or without the example and its copies, or it is not in the bank"
    ),
}


def _log_probabilities(bank: BankValues) -> tuple[Column, Values]:
    """Return log p of the target and of the members; all NaN where the values are no probabilities."""
    if bank.of == "gap":
        return np.full_like(bank.target, np.nan), np.full_like(bank.values, np.nan)
    if bank.of == "loss":
        return bank.target, bank.values
    with np.errstate(invalid="ignore"):
        return -np.logaddexp(0.0, -bank.target), -np.logaddexp(0.0, -bank.values)


@measure(
    "rmia",
    "share of the other examples over which it stands out, against models trained on it or not",
    limits="one model's scores rank as its probability over the mean of the bank's does",
    order=193,
    curve=25,
    **_OF_A_BANK,
)
def _rmia(bank: BankValues) -> Column:
    target, values = _log_probabilities(bank)
    return rmia(target, values, bank.membership, left_out=bank.left_out)


@measure(
    "rmia_offline",
    "share of the other examples over which it stands out, against models that were not trained on it",
    limits="weaker than rmia: it does not know what being trained on the example does",
    order=203,
    **_OF_A_BANK,
)
def _rmia_offline(bank: BankValues) -> Column:
    target, values = _log_probabilities(bank)
    judges = values if bank.left_out is None else values[~bank.left_out]
    membership = bank.membership if bank.left_out is None else bank.membership[~bank.left_out]
    return rmia_offline(target, judges, membership, slope=fit_slope(judges, membership))


@measure(
    "rmia_reference",
    "share of the held-out examples, or of all without a holdout, over which it stands out against the reference model",
    stage="losses",
    needs=("token scores", "reference model"),
    sign=1,
    relative=True,
    missing="cut off for one of the two models",
    cost="a forward pass of the reference model",
    limits="as good as the reference: one model that knows the kind of text and none of the examples",
    order=83,
)
def _rmia_reference(losses: Losses) -> Column:
    assert losses.reference_total is not None
    # Per token of this model, so that a reference with other tokens is compared on the same text.
    reference = -losses.reference_total / losses.targets
    population = losses.held_out if losses.held_out.any() else None
    return rmia_offline(-losses.mean, reference[None], population=population)
