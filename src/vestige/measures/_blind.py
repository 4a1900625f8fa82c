"""What is known about membership without any model: the baseline that an attack has to beat."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from vestige.errors import DataError
from vestige.measures._attack import Attack, area, attack, delong_variance

DRAWS = 40
"""Random memberships by which the spread of the area is measured: known to a tenth."""
SAMPLE = 1000
"""Most examples that these are drawn for; the ratio of variances falls slowly with more."""


def blind(
    texts: Sequence[str],
    members: Bool[np.ndarray, "example"],
    *,
    dates: Float[np.ndarray, "example"] | None = None,
    folds: int = 5,
    seed: int = 0,
) -> Float[np.ndarray, "example"]:
    """Score with a classifier that reads the texts and never a model: high speaks for membership, 0 to 1.

    Words, length and date, logistic regression, each example scored by a fit on the other folds. Where it does better
    than chance, members and others differ by themselves, and an attack's AUC says little about the model (Das et
    al. 2024, "Blind baselines beat membership inference attacks"). Equal texts are kept in one fold. A score is the
    example's rank within its fold, for levels of different fits do not compare.

    Args:
        texts: Of all examples.
        members: Who was trained on.
        dates: As numbers, NaN where unknown.
        folds: Fewer where a side has fewer examples.
        seed: Of the folds.

    Raises:
        DataError: Shapes that do not agree, or a side with fewer than two different texts.
    """
    members = np.asarray(members, dtype=bool)
    return _scores(_folds(texts, members, dates, folds, seed), members)


def blind_attack(
    texts: Sequence[str],
    members: Bool[np.ndarray, "example"],
    *,
    dates: Float[np.ndarray, "example"] | None = None,
    folds: int = 5,
    seed: int = 0,
) -> Attack:
    """Return what the scores of `blind` show about membership, with intervals that count the fits.

    Scores of a cross-validation depend on one another: every fit uses the same examples as the others. How much more
    their area varies is measured where there is nothing to find: memberships are drawn again within each fold, texts
    that are equal together, and fitted again. Of more examples a sample is taken for this.

    Raises:
        DataError: As for `blind`.
    """
    members = np.asarray(members, dtype=bool)
    prepared = _folds(texts, members, dates, folds, seed)
    effect = _design_effect(texts, members, dates, folds, seed)
    return attack(_scores(prepared, members), members, design_effect=effect)


class _Fold(NamedTuple):
    fit: Int[np.ndarray, "row"]
    held: Int[np.ndarray, "row"]
    fitted: Any
    """Features of the rows to fit."""
    judged: Any
    """Features of the rows held out."""


def _folds(texts: Sequence[str], members: np.ndarray, dates: np.ndarray | None, folds: int, seed: int) -> list[_Fold]:
    from sklearn.model_selection import StratifiedGroupKFold

    if members.shape != (len(texts),) or (dates is not None and dates.shape != members.shape):
        raise DataError(f"{len(texts)} texts for {members.shape} memberships; dates, if given, need one each too.")
    groups = _groups(texts)
    fewest = min(len(np.unique(groups[side])) for side in (members, ~members))
    if fewest < 2:
        raise DataError("A blind baseline needs two different texts of members and two of others, at least.")
    splits = StratifiedGroupKFold(min(folds, fewest), shuffle=True, random_state=seed)
    return [
        _Fold(fit, held, *_features(texts, dates, fit, held))
        for fit, held in splits.split(np.zeros(len(texts)), members, groups)
        if len(held) and len(np.unique(members[fit])) == 2
    ]


def _scores(
    folds: Sequence[_Fold], members: Bool[np.ndarray, "example"], solver: str = "lbfgs"
) -> Float[np.ndarray, "example"]:
    from scipy.stats import rankdata
    from sklearn.linear_model import LogisticRegression

    scores = np.full(len(members), np.nan)
    for fold in folds:
        model = LogisticRegression(C=1.0, max_iter=1000, solver=solver).fit(fold.fitted, members[fold.fit])
        scores[fold.held] = (rankdata(model.decision_function(fold.judged)) - 0.5) / len(fold.held)
    return scores


def _design_effect(texts: Sequence[str], members: np.ndarray, dates: np.ndarray | None, folds: int, seed: int) -> float:
    """Return the variance of the area under random membership, over the variance that DeLong gives it; at least 1."""
    rng, groups = np.random.default_rng(seed), _groups(texts)
    if len(texts) > SAMPLE:
        kept = []
        for side in (np.flatnonzero(members), np.flatnonzero(~members)):
            two_texts = side[np.unique(groups[side], return_index=True)[1][:2]]
            kept += [two_texts, rng.choice(side, round(SAMPLE * len(side) / len(texts)), replace=False)]
        rows = np.unique(np.concatenate(kept))
        texts, groups = [texts[int(row)] for row in rows], groups[rows]
        members, dates = members[rows], None if dates is None else dates[rows]
    prepared, squared, expected = _folds(texts, members, dates, folds, seed), 0.0, 0.0
    for _ in range(DRAWS):
        drawn = members.copy()
        for fold in prepared:
            drawn[fold.held] = _shuffled(members[fold.held], groups[fold.held], rng)
        # Several times faster than the fit of the scores themselves, and as good for a ratio of variances.
        scores = _scores(prepared, drawn, "liblinear")
        known = ~np.isnan(scores)
        found = area(scores[known & drawn], scores[known & ~drawn])
        squared += (found.value - 0.5) ** 2
        expected += delong_variance(scores[known & drawn], scores[known & ~drawn])
    return max(1.0, squared / expected) if expected > 0 else 1.0


def _shuffled(members: np.ndarray, groups: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the memberships of a fold in another order: whole groups are swapped with groups of their size."""
    drawn = members.copy()
    order = np.argsort(groups, kind="stable")
    _, starts, counts = np.unique(groups[order], return_index=True, return_counts=True)
    for count in np.unique(counts):
        places = order[starts[counts == count][:, None] + np.arange(count)]
        drawn[places] = members[places][rng.permutation(len(places))]
    return drawn


def _groups(texts: Sequence[str]) -> np.ndarray:
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
