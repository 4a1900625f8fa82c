import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from vestige.data import NO_TARGET, CutBatches, Sharing, load_examples, make_batch, plan_batches, tokenize
from vestige.errors import DataError

LENGTHS = st.lists(st.integers(0, 300), max_size=60)


def tokens_of(*lists):
    rows = [{"input_ids": ids} for ids in lists]
    return tokenize(load_examples(rows), None, max_length=None)


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 1000), st.none() | st.integers(1, 8))
def test_every_row_is_in_one_batch_within_the_budget(lengths, budget, most):
    batches = plan_batches(np.array(lengths, dtype=np.int64), budget, most)
    rows = [int(row) for batch in batches for row in batch]
    assert sorted(rows) == list(range(len(lengths)))
    for batch in batches:
        padded = max(lengths[row] for row in batch) * len(batch)
        assert padded <= budget or len(batch) == 1
        assert most is None or len(batch) <= most


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 1000), st.randoms())
def test_the_shape_of_the_batches_does_not_depend_on_the_order_of_the_data(lengths, budget, random):
    shuffled = list(lengths)
    random.shuffle(shuffled)
    one = plan_batches(np.array(lengths, dtype=np.int64), budget)
    other = plan_batches(np.array(shuffled, dtype=np.int64), budget)
    assert [[lengths[row] for row in batch] for batch in one] == [[shuffled[row] for row in batch] for batch in other]


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 1000))
def test_longest_first_and_ties_by_row(lengths, budget):
    rows = [int(row) for batch in plan_batches(np.array(lengths, dtype=np.int64), budget) for row in batch]
    assert rows == sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))


def test_batches_of_very_many_examples_are_those_of_a_sort():
    chance = np.random.default_rng(0)
    lengths = chance.integers(0, 40, 150_000, dtype=np.int32)
    cut = CutBatches(lengths, 100, 7)
    order = np.argsort(-lengths, kind="stable")
    assert np.array_equal(cut.rows, order)
    begin = 0
    for batch in cut.batches():
        longest = max(int(lengths[order[begin]]), 1)
        end = min(begin + min(max(100 // longest, 1), 7), len(order))
        assert batch == (begin, end, longest)
        assert batch.tokens == (end - begin) * longest
        begin = end
    assert begin == len(order)
    assert cut.tokens(70, 90_000) == lengths[order[70:90_000]].sum()


def test_batches_are_filled():
    batches = plan_batches(np.array([4, 2, 4, 2, 2, 100]), 8)
    assert [batch.tolist() for batch in batches] == [[5], [0, 2], [1, 3, 4]]


def test_no_rows_make_no_batch():
    assert plan_batches(np.array([], dtype=np.int64), 8) == []


@pytest.mark.parametrize(("budget", "most"), [(0, None), (8, 0)])
def test_a_budget_below_one_is_refused(budget, most):
    with pytest.raises(DataError, match="must be above 0"):
        plan_batches(np.array([1]), budget, most)


def test_a_batch_is_padded_on_the_right_without_targets():
    rows = [{"input_ids": [7, 8, 9], "labels": [-100, -100, 9]}, {"input_ids": [5]}, {"input_ids": [3, 4]}]
    batch = make_batch(tokenize(load_examples(rows), None, max_length=None), [2, 0])
    assert batch.rows.tolist() == [2, 0]
    assert batch.input_ids.tolist() == [[3, 4, 0], [7, 8, 9]]
    assert batch.labels.tolist() == [[NO_TARGET, 4, NO_TARGET], [NO_TARGET, NO_TARGET, 9]]
    assert batch.input_ids.dtype == batch.labels.dtype == batch.rows.dtype == torch.int64


def test_a_batch_takes_planned_rows_and_is_never_empty_in_width():
    data = tokens_of([], [])
    batch = make_batch(data, plan_batches(data.lengths, 8)[0])
    assert batch.input_ids.shape == (2, 1)
    assert (batch.labels == NO_TARGET).all()


def test_a_batch_moves_to_a_device_whole():
    batch = make_batch(tokens_of([1, 2]), [0]).to("cpu")
    assert batch.input_ids.tolist() == [[1, 2]]


@pytest.mark.parametrize("budget", [1, 20, 64, 10_000])
def test_no_batch_has_examples_from_both_sides_of_a_switch(budget):
    lengths = np.random.default_rng(0).integers(0, 40, 300)
    batches = plan_batches(lengths, budget, sharing=Sharing(switches=(9, 25)))
    assert sorted(np.concatenate(batches).tolist()) == list(range(300))
    for batch in batches:
        longest = lengths[batch].max()
        for switch in (9, 25):
            assert (lengths[batch] <= switch).all() or (lengths[batch] > switch).all()
        assert len(batch) == 1 or len(batch) * longest <= budget


def test_where_padding_counts_only_equal_lengths_share_a_batch():
    lengths = np.array([3, 5, 3, 1, 5, 5])
    batches = plan_batches(lengths, 1000, sharing=Sharing(equal=True))
    assert [batch.tolist() for batch in batches] == [[1, 4, 5], [0, 2], [3]]


def test_examples_may_be_padded_up_to_the_switch():
    assert Sharing(switches=(9, 25)).most(np.array([0, 9, 10, 25, 26])).tolist() == [9, 9, 25, 25, -1]
    assert Sharing().most(np.array([0, 26])).tolist() == [-1, -1]
