import warnings

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr

from tests.reference import evaluation as reference
from vestige.errors import DataError
from vestige.evaluate import Estimate, ceiling, choose_held_out, datamodeling_score, pearson, spearman

QUERIES, EXAMPLES, SUBSETS = 6, 40, 30


def linear_world(seed=0, *, noise=0.0, runs=1, subsets=SUBSETS, queries=QUERIES):
    """Losses that fall by the score of each example trained on: (scores, membership, losses, subset, seeds)."""
    random = np.random.default_rng(seed)
    scores = random.normal(size=(queries, EXAMPLES))
    kept = np.array([random.permutation(EXAMPLES) < EXAMPLES // 2 for _ in range(subsets)])
    subset, run = np.repeat(np.arange(subsets), runs), np.tile(np.arange(runs), subsets)
    membership = kept[subset]
    losses = 5 - membership @ scores.T + noise * random.normal(size=(len(subset), queries))
    return scores, membership, losses, subset, run


@pytest.mark.slow
def test_the_truth_of_a_linear_world_scores_one():
    scores, membership, losses, _, _ = linear_world()
    found = datamodeling_score(scores, membership, losses)
    assert found.estimate.value == pytest.approx(1.0)
    assert (found.estimate.low, found.estimate.high) == pytest.approx((1.0, 1.0))
    # The sign: scores that promise the opposite score minus one.
    assert datamodeling_score(-scores, membership, losses).estimate.value == pytest.approx(-1.0)


def test_it_is_the_slow_reference_with_noise_and_several_seeds():
    scores, membership, losses, subset, seeds = linear_world(noise=4.0, runs=3)
    found = datamodeling_score(scores, membership, losses, subset=subset, seeds=seeds, draws=0)
    rows = [np.flatnonzero(membership[subset == number][0]) for number in range(SUBSETS)]
    means = [losses[subset == number].mean(0) for number in range(SUBSETS)]
    assert found.estimate.value == pytest.approx(reference.lds(scores, rows, means))
    assert 0.2 < found.estimate.value < 0.95
    for number, value in enumerate(found.seeds):
        assert value == pytest.approx(reference.lds(scores, rows, losses[seeds == number]))


def test_random_scores_are_near_zero_and_their_interval_covers_it():
    _, membership, losses, _, _ = linear_world()
    scores = np.random.default_rng(9).normal(size=(QUERIES, EXAMPLES))
    estimate = datamodeling_score(scores, membership, losses).estimate
    assert abs(estimate.value) < 0.25
    assert estimate.low < 0 < estimate.high


def test_members_in_any_order_give_the_same_number():
    scores, membership, losses, subset, seeds = linear_world(noise=3.0, runs=2)
    expected = datamodeling_score(scores, membership, losses, subset=subset, seeds=seeds, draws=0)
    order = np.random.default_rng(1).permutation(len(subset))
    parts = (membership[order], losses[order])
    found = datamodeling_score(scores, *parts, subset=subset[order], seeds=seeds[order], draws=0)
    assert found.estimate.value == pytest.approx(expected.estimate.value)
    assert found.seeds == pytest.approx(expected.seeds)


@pytest.mark.slow
def test_trap_constant_losses_are_left_out_and_counted_not_nan():
    scores, membership, losses, _, _ = linear_world()
    losses[:, 2] = 1.5
    scores[4] = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = datamodeling_score(scores, membership, losses)
    assert found.undefined == 2
    assert np.isnan(found.per_query[[2, 4]]).all()
    assert found.estimate.value == pytest.approx(1.0)


@pytest.mark.slow
def test_intervals_cover_the_truth_about_as_often_as_they_say():
    """The score of noisy worlds against the mean of many; two crossed bootstraps are rather too wide than narrow."""

    def estimate(seed, draws):
        scores, membership, losses, _, _ = linear_world(seed, noise=8.0)
        return datamodeling_score(scores, membership, losses, draws=draws, seed=seed).estimate

    right = np.mean([estimate(1000 + seed, 0).value for seed in range(200)])
    found = [estimate(seed, 100) for seed in range(40)]
    covered = np.mean([one.low <= right <= one.high for one in found])
    # 95 % of 40, less three standard errors; the bootstrap of ranks is biased a little towards zero.
    assert covered >= 0.86
    assert np.mean([one.high - one.low for one in found]) < 0.6


def test_the_ceiling_is_what_the_truth_reaches_against_noisy_means():
    scores, membership, losses, subset, seeds = linear_world(3, noise=6.0, runs=4, subsets=150, queries=20)
    limit = ceiling(losses, subset, seeds)
    reached = datamodeling_score(scores, membership, losses, subset=subset, draws=0).estimate.value
    assert limit.whole == pytest.approx(reached, abs=0.04)
    assert limit.half < limit.whole < 1
    assert np.isnan(ceiling(losses[seeds == 0], subset[seeds == 0], seeds[seeds == 0]).whole)


def test_trap_a_damping_is_not_judged_on_the_queries_it_was_chosen_on():
    random = np.random.default_rng(0)
    candidates = [random.normal(size=50) for _ in range(20)]
    best, others = choose_held_out(candidates)
    assert len(others) == 45
    chosen_on = np.setdiff1d(np.arange(50), others)
    assert candidates[best][chosen_on].mean() == max(each[chosen_on].mean() for each in candidates)
    assert candidates[best][chosen_on].mean() > candidates[best][others].mean() + 0.5


def test_correlations_are_scipys_and_nan_where_there_is_none():
    random = np.random.default_rng(0)
    first, second = random.integers(4, size=(12, 5)).astype(float), random.normal(size=(12, 5))
    for column in range(5):
        pair = first[:, column], second[:, column]
        assert spearman(first, second)[column] == pytest.approx(spearmanr(*pair).statistic)
        assert pearson(first, second)[column] == pytest.approx(pearsonr(*pair).statistic)
    first[:, 0], first[3, 1], second[:, 2] = 0.1, np.nan, 1e9 / 3
    assert np.isnan(spearman(first, second)).tolist() == [True, True, True, False, False]
    assert np.isnan(pearson(first, second)).tolist() == [True, True, True, False, False]


def test_mistakes_are_answered():
    scores, membership, losses, _, _ = linear_world()
    with pytest.raises(DataError, match="do not fit"):
        datamodeling_score(scores[:, 1:], membership, losses)
    with pytest.raises(DataError, match="2 subsets"):
        datamodeling_score(scores, membership[:2], losses[:2])
    losses[0, 0] = np.nan
    with pytest.raises(DataError, match="1 of the losses are not finite"):
        datamodeling_score(scores, membership, losses)


def test_an_estimate_knows_whether_it_is_one():
    assert not Estimate(float("nan"), 0.0, 0.0).is_known
