"""How soon the right examples come in a ranking. Ties count as their expected value over every order of the tied.

All of it follows from a few counts, taken from blocks of scores: of each score that a right example has, how many
examples score higher and how many as high.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, final

import numpy as np
from jaxtyping import Bool, Float, Int

from vestige.errors import DataError

BLOCK = 2**16
"""Scores that are counted at once."""


class Ties(NamedTuple):
    """Of each distinct score that a right example has, highest first."""

    begins: Int[np.ndarray, "value"]
    """Examples that score higher."""
    sizes: Int[np.ndarray, "value"]
    """Examples of this score."""
    hits: Int[np.ndarray, "value"]
    """Those of them that are right."""
    examples: int
    """Of the whole ranking."""


@final
class TieCounter:
    """Counts examples by how they score beside the right ones; takes in their scores in parts of any order."""

    def __init__(self, right: Float[np.ndarray, "right"]) -> None:
        """Begin with nothing counted.

        Args:
            right: Scores of the right examples, which are to be among those that are added.
        """
        if not len(right):
            raise DataError("No example is marked, so there is nothing to find.")
        self._values, self._hits = np.unique(right, return_counts=True)
        self._counts = np.zeros(2 * len(self._values) + 1, dtype=np.int64)

    def add(self, scores: Float[np.ndarray, "example"]) -> None:
        """Take in some scores.

        Raises:
            DataError: One is not finite.
        """
        for start in range(0, len(scores), BLOCK):
            part = np.array(scores[start : start + BLOCK])
            if not np.isfinite(part).all():
                raise DataError("Some scores are not finite numbers, so they do not rank.")
            self._counts += np.bincount(codes(self._values, part), minlength=len(self._counts))

    def ties(self) -> Ties:
        """Return the counts."""
        above = self._counts[::-1].cumsum()
        sizes = self._counts[1::2][::-1]
        return Ties(above[1::2] - sizes, sizes, self._hits[::-1], int(above[-1]))


def codes(values: Float[np.ndarray, "value"], scores: Float[np.ndarray, "example"]) -> Int[np.ndarray, "example"]:
    """Return each score's code among ascending distinct values: 2 j + 1 at value j, 2 j below it and above the last."""
    return np.searchsorted(values, scores, "left") + np.searchsorted(values, scores, "right")


def tied(scores: Float[np.ndarray, "example"], right: Bool[np.ndarray, "example"]) -> Ties:
    """Return the counts of scores that are in memory.

    Raises:
        DataError: No example is marked, or a score is not finite.
    """
    if scores.shape != right.shape:
        raise DataError(f"{len(scores)} scores for {len(right)} examples.")
    counter = TieCounter(_marked(scores, right))
    counter.add(scores)
    return counter.ties()


def _marked(scores: Float[np.ndarray, "example"], marks: Bool[np.ndarray, "example"]) -> Float[np.ndarray, "marked"]:
    """Return the scores of the marked examples, in float64."""
    return scores[marks].astype(np.float64)


def found_after(ties: Ties, counts: Sequence[int]) -> list[float]:
    """Return the expected share of right examples in the first `counts` of the ranking, over all orders of ties."""
    begins, sizes, hits, _ = ties
    # Of a group that is cut, each order is equally likely, so each of its positions holds the same share of its hits.
    inside = (np.clip(count - begins, 0, sizes) for count in counts)
    return [float((hits * part / sizes).sum() / hits.sum()) for part in inside]


def reciprocal_rank(ties: Ties) -> float:
    """Return the expected value of 1 / rank of the first right example, over all orders of tied scores.

    In a group of n tied examples of which r are right, behind b others, the first right one has position j with
    probability C(n - j, r - 1) / C(n, r).
    """
    begin, size, among = (int(each[0]) for each in ties[:3])
    # Step by step from j = 1, for binomial coefficients of thousands would overflow.
    probability, total = among / size, 0.0
    for place in range(1, size - among + 2):
        total += probability / (begin + place)
        if place <= size - among:
            probability *= (size - among - place + 1) / (size - place)
    return total


def detection(ties: Ties) -> tuple[float, float]:
    """Return area under the ROC curve, and average precision, of scores that should be higher for the right ones.

    The area is the probability that a right example scores higher than another, a tie counting one half. Average
    precision is the sum of precision times the rise in recall, threshold by threshold, not the trapezoids under the
    curve, which are optimistic.

    Raises:
        DataError: All examples are right.
    """
    begins, sizes, hits, examples = ties
    reached = hits.cumsum()
    right, others = int(reached[-1]), examples - int(reached[-1])
    if not others:
        raise DataError("Every example is marked, so there is nothing to compare them with.")
    # Twice the others below, so that halves stay whole numbers.
    above, level = begins - (reached - hits), sizes - hits
    wins = int((hits * (2 * (others - above) - level)).sum())
    return wins / 2 / right / others, float((hits / right * (reached / (begins + sizes))).sum())


def resampled_areas(
    scores: Float[np.ndarray, "example"], wrong: Bool[np.ndarray, "example"], draws: int, seed: int
) -> Float[np.ndarray, "draw"]:
    """Draw bootstrap areas; wrong and right examples are drawn apart, so that no draw lacks one of them.

    In memory are at most 24 bytes for each example, and 16 for each wrong one: a draw may pick any.
    """
    random, own_scores = np.random.default_rng(seed), _marked(scores, wrong)
    values = np.unique(own_scores)
    found = codes(values, scores).astype(np.min_scalar_type(2 * len(values)))
    own, others = found[wrong], found[~wrong]
    beside = np.zeros(2 * len(values) + 1, dtype=np.min_scalar_type(2 * len(own)))
    areas = np.empty(draws)
    for draw in range(draws):
        counts = np.zeros(len(values) + 1, dtype=np.int64)
        for picked in _picks(random, len(own)):
            counts[1:] += np.bincount(own[picked] // 2, minlength=len(values))
        # Of the drawn wrong ones: those below each code, and those up to it.
        below = np.cumsum(counts, out=counts)
        beside[::2], beside[1::2] = 2 * below, below[:-1] + below[1:]
        losses = sum(int(beside[others[picked]].sum()) for picked in _picks(random, len(others)))
        areas[draw] = 1 - losses / 2 / len(own) / len(others)
    return areas


def _picks(random: np.random.Generator, count: int) -> Iterator[np.ndarray]:
    """Yield `count` positions, drawn with replacement: the numbers of `choice`, which would hold all of them."""
    return (random.integers(count, size=min(BLOCK, count - start)) for start in range(0, count, BLOCK))
