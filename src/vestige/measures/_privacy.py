"""Lower bounds on the privacy loss epsilon of a training, from canaries that were drawn at random."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from scipy.stats import beta, binom

from vestige.errors import DataError, SpecError

CONFIDENCE = 0.95
_STEPS = 60
"""Halvings of an interval of epsilon."""
_MOST_EPSILON = 64.0


def epsilon_from_ranks(ranks: Float[np.ndarray, "canary"], candidates: int, *, confidence: float = CONFIDENCE) -> float:
    """Return a lower bound on epsilon from the ranks of secrets among the candidates that they were drawn from.

    Under epsilon-differential privacy no set of t of the N candidates, chosen from the model, holds the secret with
    more than

        q(t) = t e^epsilon / (t e^epsilon + N - t)

    and the number of secrets of m whose rank is t or less is stochastically below a binomial of m and q(t) (the
    argument of Steinke et al. 2023, "Privacy auditing with one training run", for a choice of N in place of 2). The
    bound is the largest of those for t = 1, 2, 4, ... N / 2, each at a confidence that makes all hold at once.

    Valid if each secret was drawn uniformly, and independently, from its candidates before the training, which took
    it once: where a secret stands c times, the bound is for all c together, and 1 / c of it for one. Neighbouring data
    sets are those in which one secret is exchanged; for adding or leaving out, halve it. delta is 0.

    Args:
        ranks: 1 for the likeliest; where several are as likely, the last of their positions.
        candidates: N, the secret among them.
        confidence: That epsilon is at least the bound.

    Returns:
        0 where the ranks show nothing.

    Raises:
        DataError: No ranks, or one outside 1 to N.
        SpecError: A confidence outside (0, 1).
    """
    ranks = np.asarray(ranks, dtype=np.float64)
    if not len(ranks) or candidates < 2 or not ((ranks >= 1) & (ranks <= candidates)).all():
        raise DataError(f"{len(ranks)} ranks among {candidates} candidates: give ranks from 1 to 2 or more candidates.")
    _check_confidence(confidence)
    tops = [1]
    while tops[-1] * 4 <= candidates:
        tops.append(tops[-1] * 2)
    error, found = (1 - confidence) / len(tops), 0.0
    for top in tops:
        hits = int((ranks <= top).sum())
        if hits:
            least = float(beta.ppf(error, hits, len(ranks) - hits + 1))
            found = max(found, float(np.log(least / (1 - least) * (candidates - top) / top)))
    return found


def epsilon_from_guesses(
    correct: int, guesses: int, canaries: int, *, delta: float = 0.0, confidence: float = CONFIDENCE
) -> float:
    """Return a lower bound on epsilon from guesses which canaries were trained on, each with probability 1/2.

        P(W >= v) <= P(B >= v) + 2 m delta max over i of P(v > B >= v - i) / i,  B binomial of r and e^eps / (1 + e^eps)

    for v right ones of r guesses about m canaries; the bound is the largest epsilon at which this is below
    1 - confidence. Steinke et al. 2023, "Privacy auditing with one training run", theorem 5.2. Neighbours differ in one
    canary, added or left out.

    Args:
        correct: Right guesses.
        guesses: Canaries that were guessed about; one may abstain from the others.
        canaries: All that a coin was thrown for.
        delta: Of (epsilon, delta)-differential privacy.
        confidence: That epsilon is at least the bound.

    Raises:
        DataError: Numbers that do not go together.
        SpecError: A confidence or a delta outside its range.
    """
    if not 0 <= correct <= guesses <= canaries or guesses < 1:
        raise DataError(f"{correct} right of {guesses} guesses about {canaries} canaries: these do not go together.")
    _check_confidence(confidence)
    if not 0 <= delta < 1:
        raise SpecError(f"delta={delta}: give a number from 0 to below 1.")
    low, high = 0.0, _MOST_EPSILON
    if _chance_of(correct, guesses, canaries, low, delta) > 1 - confidence:
        return 0.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if _chance_of(correct, guesses, canaries, middle, delta) <= 1 - confidence:
            low = middle
        else:
            high = middle
    return low


def _chance_of(correct: int, guesses: int, canaries: int, epsilon: float, delta: float) -> float:
    """Return the most that the chance of as many right guesses can be under (epsilon, delta)."""
    right = 1 / (1 + np.exp(-epsilon))
    found = float(binom.sf(correct - 1, guesses, right))
    if delta and correct:
        below = np.cumsum(binom.pmf(np.arange(correct - 1, -1, -1), guesses, right))
        found += 2 * canaries * delta * float((below / np.arange(1, correct + 1)).max())
    return min(found, 1.0)


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise SpecError(f"confidence={confidence}: give a number between 0 and 1, such as 0.95.")
