"""Sets of components chosen from products by component: exact, fast, the same for every order, and judged held out."""

import time

import numpy as np
import pytest

from tests.reference.components import greedy as slow_greedy, subset_cosine
from vestige.evaluate import (
    ComponentProducts,
    Path,
    assign_folds,
    compute_agreement,
    credit,
    cross_validate,
    estimate_mean,
    greedy_path,
)


def drawn(components=6, queries=5, candidates=4, examples=9, seed=0, right_first=0.0):
    """Products of random vectors, so that they could be those of gradients."""
    random = np.random.default_rng(seed)
    widths = random.integers(2, 6, size=components)
    rows = np.stack([random.permutation(examples)[:candidates] for _ in range(queries)])
    right = np.zeros((queries, candidates), dtype=bool)
    right[np.arange(queries), random.integers(candidates, size=queries)] = True
    values = np.zeros((components, queries, candidates))
    norms = np.zeros((components, queries)), np.zeros((components, examples))
    for number, width in enumerate(widths):
        of_queries, of_examples = random.normal(size=(queries, width)), random.normal(size=(examples, width))
        for query in range(queries):
            of_queries[query] += right_first * of_examples[rows[query][right[query]][0]]
        values[number] = np.take_along_axis(of_queries @ of_examples.T, rows, 1)
        norms[0][number], norms[1][number] = (of_queries**2).sum(1), (of_examples**2).sum(1)
    names = tuple(f"layer.{number}.weight" for number in range(components))
    return ComponentProducts(names, widths * 100, values, *norms, rows), right


def test_the_cosine_of_a_set_is_that_of_its_products_and_of_one_its_own():
    products, _ = drawn()
    for chosen in ([2], [4], [0, 3], list(range(6))):
        expected = [
            [
                subset_cosine(
                    products.values[:, query, place], products.query[:, query], products.example[:, row], chosen
                )
                for place, row in enumerate(products.rows[query])
            ]
            for query in range(5)
        ]
        np.testing.assert_allclose(products.cosine(chosen), expected, rtol=1e-12)


@pytest.mark.parametrize("objective", ["accuracy", "agreement"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_fast_path_is_the_slow_one(objective, seed):
    products, right = drawn(seed=seed, right_first=0.5)
    path = greedy_path(products, right, objective)
    parts = (products.values, products.query, products.example, products.rows, right, products.parameters)
    order, values = slow_greedy(*(part.tolist() for part in parts), objective)
    assert list(path.order) == order
    np.testing.assert_allclose(path.values, values, rtol=1e-10)
    np.testing.assert_allclose(greedy_path(products, right, objective, order=path.order).values, values, rtol=1e-10)


def test_trap_equal_components_are_taken_in_an_order_that_no_hash_decides():
    products, right = drawn(components=8, seed=3, right_first=2.0)
    order = [products.names[number] for number in greedy_path(products, right, "accuracy").order]
    shuffle = np.random.default_rng(0).permutation(8)
    other = ComponentProducts(
        tuple(products.names[number] for number in shuffle),
        np.argsort(np.argsort(products.parameters, kind="stable"), kind="stable")[shuffle],
        products.values[shuffle],
        products.query[shuffle],
        products.example[shuffle],
        products.rows,
    )
    assert [other.names[number] for number in greedy_path(other, right, "accuracy").order] == order


def test_a_path_over_113_components_takes_seconds():
    products, right = drawn(components=113, queries=250, candidates=5, examples=250, right_first=0.2)
    started = time.process_time()
    path = greedy_path(products, right, "accuracy")
    assert len(path.order) == 113
    assert time.process_time() - started < 10


def test_trap_a_gain_that_was_chosen_by_its_own_queries_vanishes_held_out():
    products, right = drawn(components=60, queries=60, candidates=5, examples=200, right_first=0.0)
    groups = np.arange(60)
    chosen_by_all = max(greedy_path(products, right, "accuracy", longest=10).values)
    found = cross_validate(products, right, "accuracy", groups, folds=5, seed=0, longest=10)
    assert chosen_by_all > 0.35, "chance is 0.2: the search overfits, as it must"
    assert found.train > 0.35
    assert found.credit.mean() < 0.33
    assert len(found.chosen) == 5


def test_a_component_that_knows_is_found_held_out_as_well():
    products, right = drawn(components=20, queries=60, candidates=5, examples=200)
    told = products.values.copy()
    told[7] += 20 * right
    norms = products.example.copy(), products.query.copy()
    norms[0][7] += 400
    knowing = ComponentProducts(products.names, products.parameters, told, norms[1], norms[0], products.rows)
    found = cross_validate(knowing, right, "accuracy", np.arange(60), folds=5, seed=0)
    assert all(chosen[0] == 7 for chosen in found.chosen)
    assert found.credit.mean() > 0.95


def test_trap_paraphrases_of_one_original_are_in_one_fold():
    groups = np.array([0, 0, 0, 1, 1, 2, 3, 3, 4, 5])
    folds = assign_folds(groups, 3, seed=1)
    assert all(len(set(folds[groups == group])) == 1 for group in range(6))
    assert set(folds) == {0, 1, 2}
    assert max(assign_folds(np.array([0, 0, 1]), 5, seed=0)) == 1


def test_trap_ties_count_as_their_share_and_no_place_in_the_list_decides():
    scores = np.array([[0.5, 0.5, 0.1, 0.5]])
    listed = np.ones((1, 4), dtype=bool)
    for place, expected in ((0, 1 / 3), (1, 1 / 3), (2, 0.0), (3, 1 / 3)):
        right = np.zeros((1, 4), dtype=bool)
        right[0, place] = True
        assert credit(scores, right, listed)[0] == pytest.approx(expected)


def test_a_candidate_that_is_not_there_wins_nothing():
    scores, right = np.array([[-0.5, 0.0]]), np.array([[True, False]])
    assert credit(scores, right, np.array([[True, False]]))[0] == 1.0


def test_trap_uncentred_agreement_is_high_for_what_tells_nothing_apart():
    random = np.random.default_rng(0)
    full = 0.8 + 0.02 * random.normal(size=(50, 5))
    blind = 0.7 + 0.02 * random.normal(size=(50, 5))
    listed = np.ones((50, 5), dtype=bool)
    assert compute_agreement(blind, full, listed) > 0.99
    assert abs(compute_agreement(blind, full, listed, centred=True)) < 0.3
    assert compute_agreement(full, full, listed, centred=True) == pytest.approx(1.0)


def test_the_shortest_set_with_the_highest_value_is_chosen_or_the_first_that_is_enough():
    path = Path((4, 2, 0, 1), (0.7, 0.9, 0.9, 0.8))
    assert path.best() == (4, 2)
    assert path.best(0.6) == (4,)
    assert path.best(0.99) == (4, 2)


def test_intervals_are_over_originals_and_not_over_their_paraphrases():
    values = np.repeat(np.array([1.0, 0.0, 1.0, 1.0, 0.0, 1.0]), 20)
    alone = estimate_mean(values, 500, 0, np.arange(120))
    together = estimate_mean(values, 500, 0, np.repeat(np.arange(6), 20))
    assert alone.value == together.value
    assert together.high - together.low > 3 * (alone.high - alone.low)
