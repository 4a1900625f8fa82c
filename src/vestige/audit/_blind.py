"""What can be told about membership without any model: the line that an attack has to beat."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from vestige.errors import DataError


def blind(
    texts: Sequence[str],
    members: Bool[np.ndarray, "example"],
    *,
    dates: Float[np.ndarray, "example"] | None = None,
    folds: int = 5,
    seed: int = 0,
) -> Float[np.ndarray, "example"]:
    """Scores of a classifier that sees the texts and never a model: high speaks for membership, 0 to 1.

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
    from scipy.stats import rankdata
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold

    members = np.asarray(members, dtype=bool)
    if members.shape != (len(texts),) or (dates is not None and dates.shape != members.shape):
        raise DataError(f"{len(texts)} texts for {members.shape} memberships; dates, if given, need one each too.")
    _, groups = np.unique(np.asarray(texts, dtype=object).astype(str), return_inverse=True)
    fewest = min(len(np.unique(groups[side])) for side in (members, ~members))
    if fewest < 2:
        raise DataError("A blind baseline needs two different texts of members and two of others, at least.")
    splits = StratifiedGroupKFold(min(folds, fewest), shuffle=True, random_state=seed)
    scores = np.full(len(texts), np.nan)
    for fit, held in splits.split(np.zeros(len(texts)), members, groups):
        if not len(held) or len(np.unique(members[fit])) < 2:
            continue
        inputs, others = _features(texts, dates, fit, held)
        model = LogisticRegression(C=1.0, max_iter=1000).fit(inputs, members[fit])
        scores[held] = (rankdata(model.decision_function(others)) - 0.5) / len(held)
    return scores


def _features(texts: Sequence[str], dates: np.ndarray | None, fit: np.ndarray, held: np.ndarray) -> list:
    """Features of the rows to fit and of those held out; every scale and every word is the fit's."""
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
    except ValueError:  # Nothing but white space: there are no words to tell by.
        return [scale.transform(plain[rows]) for rows in (fit, held)]
    return [
        hstack([words.transform([texts[row] for row in rows]), csr_matrix(scale.transform(plain[rows]))])
        for rows in (fit, held)
    ]
