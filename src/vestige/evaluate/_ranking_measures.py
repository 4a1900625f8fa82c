"""How soon the right examples come in a ranking. Ties count as their expected value over every order of the tied."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float
from scipy.stats import rankdata

from vestige.errors import DataError


def recall(scores: Float[np.ndarray, "example"], right: Bool[np.ndarray, "example"], k: int) -> float:
    """Expected share of the right examples among the `k` highest scores, over all orders of tied scores."""
    return found_after(scores, right, [k])[0]


def found_after(
    scores: Float[np.ndarray, "example"], right: Bool[np.ndarray, "example"], counts: Sequence[int]
) -> list[float]:
    """Expected share of the right examples among the first `counts` of the ranking, over all orders of tied scores."""
    _check(scores, right)
    begins, sizes, hits = _tied_groups(scores, right)
    # Of a group that is cut, each order is equally likely, so each of its places holds the same share of its hits.
    inside = [np.clip(count - begins, 0, sizes) for count in counts]
    return [float((hits * part / sizes).sum() / hits.sum()) for part in inside]


def reciprocal_rank(scores: Float[np.ndarray, "example"], right: Bool[np.ndarray, "example"]) -> float:
    """Expected value of 1 / rank of the first right example, over all orders of tied scores.

    In a group of n tied examples of which r are right, behind b others, the first right one has place j with
    probability C(n - j, r - 1) / C(n, r).
    """
    _check(scores, right)
    begins, sizes, hits = _tied_groups(scores, right)
    first = int(np.flatnonzero(hits)[0])
    begin, size, among = int(begins[first]), int(sizes[first]), int(hits[first])
    # Step by step from j = 1, for binomial coefficients of thousands would overflow.
    probability, total = among / size, 0.0
    for place in range(1, size - among + 2):
        total += probability / (begin + place)
        if place <= size - among:
            probability *= (size - among - place + 1) / (size - place)
    return total


def area_under_curve(wrong: Float[np.ndarray, "one"], right: Float[np.ndarray, "other"]) -> float:
    """Probability that a wrong example scores higher than a right one, a tie counting one half; O(n log n)."""
    ranks = rankdata(np.concatenate([wrong, right]))[: len(wrong)]
    return float((ranks.sum() / len(wrong) - (len(wrong) + 1) / 2) / len(right))


def detection(scores: Float[np.ndarray, "example"], wrong: Bool[np.ndarray, "example"]) -> tuple[float, float]:
    """Area under the ROC curve, and average precision, of scores that should be higher for the wrong ones.

    Average precision is the sum of precision times the rise in recall, threshold by threshold, not the trapezoids under
    the curve, which are optimistic.

    Raises:
        DataError: No example is wrong or all are, or a score is not finite.
    """
    from sklearn.metrics import average_precision_score

    _check(scores, wrong)
    if wrong.all():
        raise DataError("Every example is marked, so there is nothing to tell them from.")
    return area_under_curve(scores[wrong], scores[~wrong]), float(average_precision_score(wrong, scores))


def _tied_groups(scores: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each distinct score, highest first: how many examples come before, share it, and are right of these."""
    _, group = np.unique(-scores, return_inverse=True)
    sizes = np.bincount(group)
    return sizes.cumsum() - sizes, sizes, np.bincount(group, weights=right.astype(np.float64))


def _check(scores: np.ndarray, right: np.ndarray) -> None:
    if scores.shape != right.shape:
        raise DataError(f"{len(scores)} scores for {len(right)} examples.")
    if not right.any():
        raise DataError("No example is marked, so there is nothing to find.")
    if not np.isfinite(scores).all():
        raise DataError("Some scores are not finite numbers, so they do not rank.")
