import numpy as np
import pytest

from tests.reference import evaluation as reference
from vestige.errors import DataError
from vestige.evaluate import compute_effects, correlate_effects, correlate_seeds

GROUPS = [[0, 1, 2], [3, 4], [5, 6, 7, 8], [9]]


def world(noise=0.0, runs=2, seed=0):
    """A bank without each group: its losses rise by the scores of what was left out."""
    random = np.random.default_rng(seed)
    scores = random.normal(1.0, 1.0, size=(7, 10))
    membership = np.ones((5, 10), dtype=bool)
    for number, group in enumerate(GROUPS):
        membership[number + 1, group] = False
    subset, seeds = np.repeat(np.arange(5), runs), np.tile(np.arange(runs), 5)
    membership = membership[subset]
    losses = 3 - membership @ scores.T + noise * random.normal(size=(len(subset), 7))
    return scores, membership, losses, subset, seeds


def test_planted_effects_agree_perfectly():
    scores, membership, losses, subset, _ = world()
    found = compute_effects(scores, membership, losses, subset)
    assert found.truth == pytest.approx(found.predicted)
    result = correlate_effects(found)
    for estimate in result[:4]:
        assert estimate.value == pytest.approx(1.0)
    opposite = correlate_effects(compute_effects(-scores, membership, losses, subset))
    assert opposite.pearson.value == pytest.approx(-1.0)


def test_correlations_are_the_slow_ones():
    scores, membership, losses, subset, _ = world(noise=2.0)
    found = compute_effects(scores, membership, losses, subset)
    result = correlate_effects(found)
    assert result.pearson.value == pytest.approx(reference.group_correlation(scores, GROUPS, found.truth))
    assert result.pearson.low <= result.pearson.value <= result.pearson.high + 1e-12


def test_trap_what_was_left_out_is_read_from_the_bank_not_from_positions():
    scores, membership, losses, subset, _ = world(noise=1.0)
    order = np.random.default_rng(3).permutation(10)
    shuffled = compute_effects(scores[:, order], membership[:, order], losses, subset)
    straight = compute_effects(scores, membership, losses, subset)
    assert shuffled.predicted == pytest.approx(straight.predicted)
    assert shuffled.truth == pytest.approx(straight.truth)


def test_seeds_agree_without_noise_and_less_with_it():
    quiet, loud = world(runs=3), world(noise=3.0, runs=3)
    assert correlate_seeds(*quiet[1:]) == pytest.approx(1.0)
    assert correlate_seeds(*loud[1:]) < 0.95
    single = world(runs=1)
    assert np.isnan(correlate_seeds(*single[1:]))


def test_mistakes_are_answered():
    scores, membership, losses, subset, _ = world(runs=1)
    with pytest.raises(DataError, match="no model of everything"):
        compute_effects(scores, membership[1:], losses[1:], subset[1:])
    with pytest.raises(DataError, match="leaves out 2 groups"):
        compute_effects(scores, membership[:3], losses[:3], subset[:3])
