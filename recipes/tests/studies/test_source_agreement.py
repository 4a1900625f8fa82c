from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr

from vestige.banks import bank_of
from vestige_recipes.common.sources import (
    left_out_truth,
    pool_agreement,
    source_agreement,
    sum_by_source,
    truth_agreement,
)


def tables(count, seed, tests=3, sources=8):
    return list(np.random.default_rng(seed).normal(size=(count, tests, sources)))


def test_agreement_is_the_mean_of_correlations_with_the_mean_truth():
    scores, truths = tables(2, 0), tables(3, 1)
    found = source_agreement(scores, truths, draws=20, seed=0)
    truth = np.mean(truths, axis=0)
    for estimate, correlation in ((found.pearson, pearsonr), (found.spearman, spearmanr)):
        expected = [[correlation(one, right)[0] for one, right in zip(each, truth, strict=True)] for each in scores]
        assert estimate.value == pytest.approx(np.mean(expected))
        if correlation is pearsonr:
            assert found.by_test == pytest.approx(np.mean(expected, axis=0))


def test_an_interval_narrows_with_more_sources_and_holds_the_value():
    def width(sources):
        truths = [np.random.default_rng(3).normal(size=(2, sources))]
        scores = [truths[0] + np.random.default_rng(4).normal(size=(2, sources))]
        found = source_agreement(scores, truths, draws=200, seed=0).pearson
        assert found.low < found.value < found.high
        return found.high - found.low

    assert width(100) < 0.5 * width(8)


def test_scores_that_do_not_vary_have_no_correlation():
    found = source_agreement([np.ones((3, 8))], tables(2, 1), draws=20, seed=0)
    assert np.isnan(found.pearson.value)
    assert np.isnan(found.pearson.low)


def test_the_ceiling_is_between_seeds():
    one, two = tables(2, 0)
    expected = np.mean([pearsonr(*pair)[0] for pair in zip(one, two, strict=True)])
    assert truth_agreement([one, two]) == pytest.approx(expected)
    assert np.isnan(truth_agreement([one]))


def test_sums_are_over_the_examples_of_a_source_and_the_queries_of_a_test():
    run = SimpleNamespace(dense=lambda: np.arange(12.0).reshape(3, 4))
    found = sum_by_source(run, SimpleNamespace(query_sources=["t", "u", "t"], sources=["b", "a", "b", "a"]))
    assert found.tolist() == [[1 + 3 + 9 + 11, 0 + 2 + 8 + 10], [5 + 7, 4 + 6]]


def test_truth_is_the_rise_of_the_loss_without_a_source_positive_where_it_helps(tmp_path):
    helps = np.array([2.0, 2.0, 0.0, 0.0, -1.0, -1.0])

    def train(rows, seed):
        return np.array([10.0 - helps[rows].sum() + seed * 0.0])

    truth = bank_of(
        train,
        examples=6,
        queries=1,
        sources=["a", "a", "b", "b", "c", "c"],
        leave_source_out=True,
        out=tmp_path / "bank",
        settings={"helps": helps.tolist()},
        seeds=2,
    )
    # Queries of such a bank have no source.
    truth.query_sources[:] = ["t"]
    assert [each.tolist() for each in left_out_truth(truth)] == [[[4.0, 0.0, -2.0]]] * 2


def test_agreement_over_groups_is_the_mean_of_theirs():
    groups = [(tables(2, 0), tables(3, 1)), (tables(1, 2), tables(2, 3))]
    found, own = pool_agreement(groups, draws=50, seed=0)
    assert own == pytest.approx([source_agreement(*group, draws=5, seed=0).pearson.value for group in groups])
    assert found.value == pytest.approx(np.mean(own))
    assert found.low < found.value < found.high
