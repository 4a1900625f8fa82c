"""How well scores distinguish members from others: areas and rates with intervals, and a baseline without a model."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import beta, norm, rankdata

from vestige.errors import DataError, SpecError

Column = Float[np.ndarray, "example"]
Mask = Bool[np.ndarray, "example"]

_TAIL = (1 - 0.95) / 2
DRAWS = 40
"""Random memberships by which the spread of the blind baseline's area is measured: known to a tenth."""
SAMPLE = 1000
"""Most examples that these are drawn for; the ratio of variances falls slowly with more."""


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
    scores: Column,
    members: Mask,
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


def group_means(values: Column, groups: Mapping[str, Mask]) -> dict[str, tuple[float, int]]:
    """Return the mean of the known values of each group and their number; (NaN, 0) for a group that is empty."""
    known = {name: values[rows & ~np.isnan(values)] for name, rows in groups.items()}
    return {name: (float(each.mean()) if len(each) else float("nan"), len(each)) for name, each in known.items()}


def _true_rate(right: np.ndarray, wrong: np.ndarray, level: float, design_effect: float) -> Rate:
    """Return the share of `right` flagged where at most `level` of `wrong` is."""
    if not len(right) or not len(wrong):
        return Rate(Interval(np.nan, np.nan, np.nan), np.nan, False)
    allowed = int(np.floor(level * len(wrong) + 1e-9))
    # The lowest score that keeps at most `allowed` of the others: above the next one of theirs, ties with it included.
    barrier = -np.inf if allowed >= len(wrong) else np.sort(wrong)[::-1][allowed]
    flagged = right[right > barrier]
    threshold = float(flagged.min()) if len(flagged) else np.inf
    return Rate(share(len(flagged), len(right), design_effect), threshold, level * len(wrong) >= 1 - 1e-9)


def _false_rate(right: np.ndarray, wrong: np.ndarray, level: float, design_effect: float) -> Rate:
    """Return the share of `wrong` flagged where at least `level` of `right` is."""
    if not len(right) or not len(wrong):
        return Rate(Interval(np.nan, np.nan, np.nan), np.nan, False)
    threshold = float(np.sort(right)[::-1][int(np.ceil(level * len(right) - 1e-9)) - 1])
    flagged = share(int((wrong >= threshold).sum()), len(wrong), design_effect)
    return Rate(flagged, threshold, level * len(right) >= 1 - 1e-9)


def blind(texts: Sequence[str], members: Mask, *, dates: Column | None = None, folds: int = 5, seed: int = 0) -> Column:
    """Score with a classifier that reads the texts and never a model: high speaks for membership, 0 to 1.

    Words, length and date, logistic regression, each example scored by a fit on the other folds. Where it does better
    than chance, members and others differ by themselves, and an attack's AUC says little about the model (Das et
    al. 2024, "Blind baselines beat membership inference attacks"). Equal texts are kept in one fold. A score is the
    example's rank within its fold, for levels of different fits do not compare.

    Dates are numbers, NaN where unknown; there are fewer `folds` where a side has fewer examples.

    Raises:
        DataError: Shapes that do not agree, or a side with fewer than two different texts.
    """
    members = np.asarray(members, dtype=bool)
    return _score_folds(_make_folds(texts, members, dates, folds, seed), members)


def blind_attack(
    texts: Sequence[str], members: Mask, *, dates: Column | None = None, folds: int = 5, seed: int = 0
) -> Attack:
    """Return what the scores of `blind` show about membership, with intervals that count the fits.

    Scores of a cross-validation depend on one another: every fit uses the same examples as the others. How much more
    their area varies is measured where there is nothing to find: memberships are drawn again within each fold, texts
    that are equal together, and fitted again. Of more examples a sample is taken for this.

    Raises:
        DataError: As for `blind`.
    """
    members = np.asarray(members, dtype=bool)
    prepared = _make_folds(texts, members, dates, folds, seed)
    effect = _design_effect(texts, members, dates, folds, seed)
    return attack(_score_folds(prepared, members), members, design_effect=effect)


class _Fold(NamedTuple):
    fit: Int[np.ndarray, "row"]
    held: Int[np.ndarray, "row"]
    fitted: Any
    """Features of the rows to fit."""
    judged: Any
    """Features of the rows held out."""


def _make_folds(
    texts: Sequence[str], members: np.ndarray, dates: np.ndarray | None, folds: int, seed: int
) -> list[_Fold]:
    from sklearn.model_selection import StratifiedGroupKFold

    if members.shape != (len(texts),) or (dates is not None and dates.shape != members.shape):
        raise DataError(f"{len(texts)} texts for {members.shape} memberships; dates, if given, need one each too.")
    groups = _number_texts(texts)
    fewest = min(len(np.unique(groups[side])) for side in (members, ~members))
    if fewest < 2:
        raise DataError("A blind baseline needs two different texts of members and two of others, at least.")
    splits = StratifiedGroupKFold(min(folds, fewest), shuffle=True, random_state=seed)
    return [
        _Fold(fit, held, *_features(texts, dates, fit, held))
        for fit, held in splits.split(np.zeros(len(texts)), members, groups)
        if len(held) and len(np.unique(members[fit])) == 2
    ]


def _score_folds(folds: Sequence[_Fold], members: Mask, solver: str = "lbfgs") -> Column:
    from sklearn.linear_model import LogisticRegression

    scores = np.full(len(members), np.nan)
    for fold in folds:
        model = LogisticRegression(C=1.0, max_iter=1000, solver=solver).fit(fold.fitted, members[fold.fit])
        scores[fold.held] = (rankdata(model.decision_function(fold.judged)) - 0.5) / len(fold.held)
    return scores


def _design_effect(texts: Sequence[str], members: np.ndarray, dates: np.ndarray | None, folds: int, seed: int) -> float:
    """Return the variance of the area under random membership, over the variance that DeLong gives it; at least 1."""
    rng, groups = np.random.default_rng(seed), _number_texts(texts)
    if len(texts) > SAMPLE:
        kept = []
        for side in (np.flatnonzero(members), np.flatnonzero(~members)):
            two_texts = side[np.unique(groups[side], return_index=True)[1][:2]]
            kept += [two_texts, rng.choice(side, round(SAMPLE * len(side) / len(texts)), replace=False)]
        rows = np.unique(np.concatenate(kept))
        texts, groups = [texts[int(row)] for row in rows], groups[rows]
        members, dates = members[rows], None if dates is None else dates[rows]
    prepared, squared, expected = _make_folds(texts, members, dates, folds, seed), 0.0, 0.0
    for _ in range(DRAWS):
        drawn = members.copy()
        for fold in prepared:
            drawn[fold.held] = _shuffle_within_groups(members[fold.held], groups[fold.held], rng)
        # Several times faster than the fit of the scores themselves, and as good for a ratio of variances.
        scores = _score_folds(prepared, drawn, "liblinear")
        known = ~np.isnan(scores)
        found = area(scores[known & drawn], scores[known & ~drawn])
        squared += (found.value - 0.5) ** 2
        expected += delong_variance(scores[known & drawn], scores[known & ~drawn])
    return max(1.0, squared / expected) if expected > 0 else 1.0


def _shuffle_within_groups(members: np.ndarray, groups: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the memberships of a fold in another order: whole groups are swapped with groups of their size."""
    drawn = members.copy()
    order = np.argsort(groups, kind="stable")
    _, starts, counts = np.unique(groups[order], return_index=True, return_counts=True)
    for count in np.unique(counts):
        places = order[starts[counts == count][:, None] + np.arange(count)]
        drawn[places] = members[places][rng.permutation(len(places))]
    return drawn


def _number_texts(texts: Sequence[str]) -> np.ndarray:
    """Return the number of each example's text: equal for equal texts."""
    return np.unique(np.asarray(texts, dtype=object).astype(str), return_inverse=True)[1]


def _features(texts: Sequence[str], dates: np.ndarray | None, fit: np.ndarray, held: np.ndarray) -> list:
    """Return features of the rows to fit and of those held out; every scale and every word is the fit's."""
    from scipy.sparse import csr_matrix, hstack
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.preprocessing import StandardScaler

    words = TfidfVectorizer(token_pattern=r"(?u)\S+", sublinear_tf=True)
    columns = [np.log1p([len(text) for text in texts]), [len(text.split()) for text in texts]]
    if dates is not None:
        unknown = np.isnan(dates)
        columns += [np.where(unknown, np.nanmean(dates[fit]) if not unknown[fit].all() else 0.0, dates), unknown]
    plain = np.stack([np.asarray(column, dtype=np.float64) for column in columns], axis=1)
    scale = StandardScaler().fit(plain[fit])
    try:
        words.fit([texts[row] for row in fit])
    except ValueError:  # Nothing but white space: there are no words to classify by.
        return [scale.transform(plain[rows]) for rows in (fit, held)]
    return [
        hstack([words.transform([texts[row] for row in rows]), csr_matrix(scale.transform(plain[rows]))])
        for rows in (fit, held)
    ]
