import time

import numpy as np
import pytest
from scipy.stats import rankdata
from sklearn.metrics import average_precision_score, roc_auc_score

from tests.reference import evaluation as reference
from vestige.errors import DataError
from vestige.evaluate import (
    count_ties,
    detection,
    jaccard,
    measure_overlap,
    overlap_by_chance,
    recall_after,
    reciprocal_rank,
    resample_areas,
)


@pytest.mark.parametrize("seed", range(8))
def test_ties_count_at_their_expected_value(seed):
    random = np.random.default_rng(seed)
    scores, right = random.integers(3, size=6).astype(float), random.permutation(6) < 2
    ties = count_ties(scores, right)
    assert reciprocal_rank(ties) == pytest.approx(reference.expected_reciprocal_rank(scores, right))
    assert recall_after(ties, range(7)) == pytest.approx(
        [reference.expected_recall(scores, right, k) for k in range(7)]
    )


def test_trap_the_order_of_rows_decides_no_tie():
    scores, right = np.zeros(100), np.arange(100) < 10
    assert recall_after(count_ties(scores, right), [10]) == pytest.approx([0.1])
    assert recall_after(count_ties(scores, right[::-1]), [10]) == pytest.approx([0.1])
    assert reciprocal_rank(count_ties(scores, right)) == pytest.approx(reciprocal_rank(count_ties(scores, right[::-1])))


def test_the_rank_of_one_right_example_among_thousands_of_ties():
    right = np.arange(20_000) == 7
    assert reciprocal_rank(count_ties(np.zeros(20_000), right)) == pytest.approx(np.mean(1 / np.arange(1, 20_001)))


@pytest.mark.parametrize("seed", range(4))
def test_detection_is_the_slow_reference_with_ties(seed):
    random = np.random.default_rng(seed)
    scores, wrong = random.integers(9, size=60).astype(float), random.permutation(60) < 12
    area, precision = detection(count_ties(scores, wrong))
    assert area == pytest.approx(reference.area(scores, wrong))
    assert precision == pytest.approx(reference.average_precision(scores, wrong))


def test_trap_average_precision_is_not_the_area_of_trapezoids():
    from sklearn.metrics import auc, precision_recall_curve

    random = np.random.default_rng(0)
    scores, wrong = random.integers(4, size=200).astype(float), random.permutation(200) < 20
    precision, reached, _ = precision_recall_curve(wrong, scores)
    assert auc(reached, precision) > detection(count_ties(scores, wrong))[1]


def test_trap_the_area_of_a_million_examples_takes_no_square_of_them():
    random = np.random.default_rng(0)
    wrong = np.arange(1_000_000) < 20_000
    scores = random.normal(size=1_000_000) + wrong
    started = time.perf_counter()
    assert detection(count_ties(scores, wrong))[0] == pytest.approx(0.76, abs=0.01)
    assert time.perf_counter() - started < 10


@pytest.mark.parametrize("kinds", [7, 100_000])
def test_counting_is_what_others_make_of_it(kinds):
    random = np.random.default_rng(kinds)
    scores, wrong = random.integers(kinds, size=1000) / 7, random.random(1000) < 0.3
    area, precision = detection(count_ties(scores, wrong))
    assert area == pytest.approx(roc_auc_score(wrong, scores), rel=1e-12)
    assert precision == pytest.approx(average_precision_score(wrong, scores), rel=1e-12)


@pytest.mark.parametrize("kinds", [7, 100_000])
def test_bootstrap_draws_are_those_of_whole_samples(kinds):
    """The same numbers as from `choice` and ranks, though neither the sample nor its ranks are ever made."""
    random = np.random.default_rng(kinds)
    marked = random.permutation(1000) < 300
    scores = random.integers(kinds, size=1000) / 7 + marked
    again, expected = np.random.default_rng(5), []
    for _ in range(20):
        drawn = [again.choice(side, len(side)) for side in (scores[marked], scores[~marked])]
        ranks = rankdata(np.concatenate(drawn))[:300]
        expected.append((ranks.sum() - 300 * 301 / 2) / 300 / 700)
    assert resample_areas(scores, marked, 20, 5) == pytest.approx(expected, rel=1e-12)


def test_found_after_reading_rises_from_nothing_to_all():
    random = np.random.default_rng(0)
    found = recall_after(count_ties(random.normal(size=50), random.permutation(50) < 5), range(51))
    assert found[0] == 0
    assert found[-1] == 1
    assert np.all(np.diff(found) >= 0)


def test_what_cannot_be_ranked_is_refused():
    with pytest.raises(DataError, match="nothing to find"):
        count_ties(np.zeros(3), np.zeros(3, dtype=bool))
    with pytest.raises(DataError, match="not finite"):
        count_ties(np.array([0.0, np.nan]), np.array([True, False]))
    with pytest.raises(DataError, match="Every example"):
        detection(count_ties(np.zeros(3), np.ones(3, dtype=bool)))


def test_overlap_of_lists():
    tops = [[1, 2, 3], [3, 4, 5], [3, 1, 2]]
    found = measure_overlap(tops)
    assert jaccard(tops[:1], tops[1:2]) == pytest.approx(1 / 5)
    assert found.queries == pytest.approx((1 / 5 + 1 + 1 / 5) / 3)
    assert np.isnan(measure_overlap(tops[:1]).queries)
    assert (found.hub, found.hub_rate) == (3, 1.0)
    assert found.cardinality == pytest.approx(5 / 9)


def test_chance_is_what_random_lists_overlap():
    random = np.random.default_rng(0)
    lists = [random.permutation(60)[:10] for _ in range(120)]
    assert measure_overlap(lists).queries == pytest.approx(overlap_by_chance(10, 60), rel=0.05)
