"""How well scores distinguish members from others: areas and rates, each with its interval."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from scipy.stats import beta, norm, rankdata

from vestige.errors import DataError, SpecError

CONFIDENCE = 0.95
_TAIL = (1 - CONFIDENCE) / 2


class Interval(NamedTuple):
    """A value with the ends of its 95 % interval; NaN where there is none."""

    value: float
    low: float
    high: float


class Rate(NamedTuple):
    """A rate at a threshold."""

    rate: Interval
    """Clopper-Pearson, at the threshold that these data gave."""
    threshold: float
    """Scores at or above it are flagged."""
    resolved: bool
    """Whether the other side has enough examples to distinguish the level from zero (1 / level of them)."""


class Attack(NamedTuple):
    """What scores show about who is a member. It is evidence about examples, not a verdict on any of them."""

    auc: Interval
    """Chance that a member scores above another, ties one half; DeLong's interval."""
    tpr_at: dict[float, Rate]
    """Share of members flagged where at most this share of the others is."""
    fpr_at: dict[float, Rate]
    """Share of others flagged where at least this share of members is."""
    members: int
    others: int
    unscored: int
    """Examples whose score is NaN, which are in no count."""


def attack(
    scores: Float[np.ndarray, "example"],
    members: Bool[np.ndarray, "example"],
    *,
    tpr_at: tuple[float, ...] = (0.01, 0.001),
    fpr_at: tuple[float, ...] = (0.75,),
    design_effect: float = 1.0,
) -> Attack:
    """Compute AUC, TPR at low FPR, and FPR at a TPR, of scores that should be higher for members.

    Examples that are scored alike are flagged together. Where a side is empty (no noisy label was planted, say)
    everything is NaN, and the counts say why.

    Args:
        scores: Oriented so that high speaks for membership; see `Measure.sign`.
        members: Or the other examples that are to be found: memorized, mislabelled.
        tpr_at: False positive rates.
        fpr_at: True positive rates.
        design_effect: How much larger variances are than those of as many independent scores, where scores share
            something, such as the fits of a cross-validation: every interval counts that many fewer examples.

    Raises:
        DataError: Shapes that do not agree.
        SpecError: A rate outside (0, 1].
    """
    if scores.shape != members.shape or scores.ndim != 1:
        raise DataError(f"Scores {scores.shape} and members {members.shape}: give one of each per example.")
    if not all(0 < level <= 1 for level in (*tpr_at, *fpr_at)):
        raise SpecError(f"Rates {tpr_at} and {fpr_at} must lie above 0 and be at most 1.")
    known = ~np.isnan(scores)
    right, wrong = scores[known & members], scores[known & ~members]
    return Attack(
        auc=area(right, wrong, design_effect=design_effect),
        tpr_at={level: _true_rate(right, wrong, level, design_effect) for level in tpr_at},
        fpr_at={level: _false_rate(right, wrong, level, design_effect) for level in fpr_at},
        members=len(right),
        others=len(wrong),
        unscored=int((~known).sum()),
    )


def area(right: Float[np.ndarray, "one"], wrong: Float[np.ndarray, "other"], *, design_effect: float = 1.0) -> Interval:
    """Compute the area under the ROC curve with DeLong's interval (DeLong et al. 1988; by ranks, Sun and Xu 2014).

    Where the two sides do not overlap DeLong's variance is zero; the end is then that of as many successes as the
    smaller side has examples. `design_effect` is as for `attack`.
    """
    ones, others = len(right), len(wrong)
    if not ones or not others:
        return Interval(np.nan, np.nan, np.nan)
    value = float(_placements(right, wrong)[0].mean())
    if value in (0.0, 1.0):
        smaller = min(ones, others)
        return share(smaller if value else 0, smaller, design_effect)
    if min(ones, others) < 2:
        return Interval(value, np.nan, np.nan)
    width = float(norm.ppf(1 - _TAIL) * np.sqrt(design_effect * delong_variance(right, wrong)))
    return Interval(value, max(0.0, value - width), min(1.0, value + width))


def delong_variance(right: Float[np.ndarray, "one"], wrong: Float[np.ndarray, "other"]) -> float:
    """Return the variance of the area under the ROC curve of independent scores, two or more on each side."""
    above, below = _placements(right, wrong)
    return float(above.var(ddof=1) / len(right) + below.var(ddof=1) / len(wrong))


def _placements(right: np.ndarray, wrong: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return, for each score, the share of the other side that it is on the right side of, ties one half."""
    ranks = rankdata(np.concatenate([right, wrong]))
    above = (ranks[: len(right)] - rankdata(right)) / len(wrong)
    return above, 1 - (ranks[len(right) :] - rankdata(wrong)) / len(right)


def share(successes: int, count: int, design_effect: float = 1.0) -> Interval:
    """Return a share with its Clopper-Pearson interval; NaN for none of none. `design_effect` is as for `attack`."""
    if not count:
        return Interval(np.nan, np.nan, np.nan)
    some, all_ = successes / design_effect, count / design_effect
    low = 0.0 if successes == 0 else float(beta.ppf(_TAIL, some, all_ - some + 1))
    high = 1.0 if successes == count else float(beta.ppf(1 - _TAIL, some + 1, all_ - some))
    return Interval(successes / count, low, high)


def group_means(
    values: Float[np.ndarray, "example"], groups: Mapping[str, Bool[np.ndarray, "example"]]
) -> dict[str, tuple[float, int]]:
    """Return the mean of the known values of each group and their number; (NaN, 0) for a group that is empty."""
    known = {name: values[rows & ~np.isnan(values)] for name, rows in groups.items()}
    return {name: (float(each.mean()) if len(each) else float("nan"), len(each)) for name, each in known.items()}


def _true_rate(right: np.ndarray, wrong: np.ndarray, level: float, design_effect: float) -> Rate:
    if not len(right) or not len(wrong):
        return Rate(Interval(np.nan, np.nan, np.nan), np.nan, False)
    allowed = int(np.floor(level * len(wrong) + 1e-9))
    # The lowest score that keeps at most `allowed` of the others: above the next one of theirs, ties with it included.
    barrier = -np.inf if allowed >= len(wrong) else np.sort(wrong)[::-1][allowed]
    flagged = right[right > barrier]
    threshold = float(flagged.min()) if len(flagged) else np.inf
    return Rate(share(len(flagged), len(right), design_effect), threshold, level * len(wrong) >= 1 - 1e-9)


def _false_rate(right: np.ndarray, wrong: np.ndarray, level: float, design_effect: float) -> Rate:
    if not len(right) or not len(wrong):
        return Rate(Interval(np.nan, np.nan, np.nan), np.nan, False)
    threshold = float(np.sort(right)[::-1][int(np.ceil(level * len(right) - 1e-9)) - 1])
    flagged = share(int((wrong >= threshold).sum()), len(wrong), design_effect)
    return Rate(flagged, threshold, level * len(right) >= 1 - 1e-9)
