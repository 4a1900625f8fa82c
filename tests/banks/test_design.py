import json

import numpy as np
import pytest

from vestige.banks import (
    EVERYTHING,
    random_subsets,
    read_lists,
    run_seed,
    without_each,
    without_each_source,
    without_one,
)
from vestige.errors import DataError


def test_every_example_is_in_about_half_of_the_halves_and_so_is_every_pair():
    subsets = random_subsets(np.arange(40), 0.5, 400, seed=3)
    inside = np.array([np.isin(np.arange(40), subset.rows) for subset in subsets])
    assert (inside.sum(axis=1) == 20).all()
    # Five standard deviations of a fair coin thrown 400 times are 0.125.
    assert np.abs(inside.mean(axis=0) - 0.5).max() < 0.125
    together = (inside.T.astype(float) @ inside) / len(inside)
    expected = 0.5 * 19 / 39
    assert np.abs(together[~np.eye(40, dtype=bool)] - expected).max() < 0.125


def test_a_longer_list_of_subsets_begins_with_the_shorter_one():
    short, long = random_subsets(np.arange(30), 0.3, 5, seed=1), random_subsets(np.arange(30), 0.3, 9, seed=1)
    assert [one.digest for one in long[:5]] == [one.digest for one in short]
    assert len({one.digest for one in long}) == 9
    assert random_subsets(np.arange(30), 0.3, 1, seed=2)[0].digest != short[0].digest


@pytest.mark.parametrize(("examples", "fraction"), [(1, 0.5), (3, 0.1), (3, 0.9), (0, 0.5)])
def test_a_fraction_that_is_none_or_all_is_refused(examples, fraction):
    with pytest.raises(DataError, match="trained on nothing, or all on the same"):
        random_subsets(np.arange(examples), fraction, 2, seed=0)


def test_copies_are_drawn_together_and_without_copies_the_draw_is_the_one_of_rows():
    groups = np.array([0, 1, 0, 2, 3, 0, 4, 5, 1, 6])
    for subset in random_subsets(groups, 0.5, 30, seed=4):
        inside = np.isin(np.arange(10), subset.rows)
        assert all(len(set(inside[groups == group])) == 1 for group in range(7)), "a group is in a subset or not"
        assert len(set(groups[subset.rows])) == 4
    # What was drawn of rows before copies were drawn together, number by number.
    by_row = [np.sort(np.random.default_rng([4, 0, number]).choice(30, 15, replace=False)) for number in range(3)]
    drawn = random_subsets(np.arange(30), 0.5, 3, seed=4)
    assert all(
        np.array_equal(one.rows, rows) and one.rows.dtype == np.int64 for one, rows in zip(drawn, by_row, strict=True)
    )


def test_an_example_is_left_out_with_its_copies_under_the_name_of_the_first():
    ids, groups = list("abcde"), np.array([0, 1, 0, 2, 1])
    left = {one.name: one.rows.tolist() for one in without_one(ids, groups, 3, seed=0)[1:]}
    assert left == {"a": [1, 3, 4], "b": [0, 2, 3], "d": [0, 1, 2, 4]}
    with pytest.raises(DataError, match="3 distinct examples"):
        without_one(ids, groups, 4, seed=0)
    (drawn,) = without_one(list("abcdef"), np.arange(6), 1, seed=5)[1:]
    assert drawn.name == "abcdef"[np.random.default_rng([5, 2]).permutation(6)[0]]


def test_sources_are_left_out_in_turn_after_everything():
    subsets = without_each_source(["b", "a", "b", "c"])
    assert [(one.name, one.rows.tolist()) for one in subsets] == [
        (EVERYTHING, [0, 1, 2, 3]),
        ("a", [0, 2, 3]),
        ("b", [1, 3]),
        ("c", [0, 1, 2]),
    ]
    with pytest.raises(DataError, match="1 of 2 examples have no source"):
        without_each_source(["a", None])
    with pytest.raises(DataError, match="none is left"):
        without_each_source(["a", "a"])


def test_lists_are_read_from_ids_by_name_or_place(tmp_path):
    file = tmp_path / "lists.json"
    file.write_text(json.dumps({"top-1": ["x"], "top-2": ["x", "z"]}))
    lists = read_lists(file, ["x", "y", "z"])
    assert {name: rows.tolist() for name, rows in lists.items()} == {"top-1": [0], "top-2": [0, 2]}
    assert read_lists([[1], [2]], ["1", "2", "3"])["1"].tolist() == [1]
    for bad, message in (([["q"]], "the data does not have: 'q'"), ([], "expected lists"), ([3], "expected lists")):
        with pytest.raises(DataError, match=message):
            read_lists(bad, ["x"])
    with pytest.raises(DataError, match="is not there"):
        read_lists(tmp_path / "absent.json", ["x"])
    with pytest.raises(DataError, match="leaves out 0 of 3"):
        without_each({"nothing": np.array([], dtype=int)}, 3)


def test_examples_that_are_left_out_one_by_one_stay_when_more_are():
    few, many = without_one(list("abcdef"), np.arange(6), 2, 0), without_one(list("abcdef"), np.arange(6), 6, 0)
    assert [one.digest for one in many[:3]] == [one.digest for one in few]
    assert sorted(one.name for one in many[1:]) == list("abcdef")
    with pytest.raises(DataError, match="cannot be left out"):
        without_one(["a", "b"], np.arange(2), 3, seed=0)


def test_seeds_of_runs_are_apart_from_each_other_and_from_subsets():
    seeds = {run_seed(0, subset, number) for subset in range(50) for number in range(4)}
    assert len(seeds) == 200
    assert {run_seed(0, None, number) for number in range(4)}.isdisjoint(seeds)
    assert run_seed(1, 0, 0) != run_seed(0, 0, 0)
