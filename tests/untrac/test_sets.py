import dataclasses

import numpy as np
import pytest

from tests.methods.conftest import tokenized
from tests.untrac.conftest import a_job, query_data, training_data, with_sources
from vestige.errors import DataError
from vestige.methods import Unlearning, check_unlearning, find_overlaps, training_sources


def joined(one, two):
    both = [*one.examples, *two.examples]
    return dataclasses.replace(
        one,
        examples=[dataclasses.replace(each, id=str(row), row=row) for row, each in enumerate(both)],
        input_ids=[*one.input_ids, *two.input_ids],
        targets=[*one.targets, *two.targets],
        truncated=np.concatenate([one.truncated, two.truncated]),
    )


def with_a_copy():
    """Three sources and a fourth that repeats the first."""
    data = training_data()
    rows = [row for row, example in enumerate(data.examples) if example.source == "s0"]
    return joined(data, with_sources(data.subset(rows), ["copy"] * len(rows)))


@pytest.mark.slow
def test_a_duplicated_source_is_flagged_and_both_copies_score_the_same(tmp_path):
    """B-R4."""
    scored = Unlearning(a_job(tmp_path, train=with_a_copy(), direction="untrac", batch_size=100, steps=3))
    names = [each.name for each in scored.job.train.sets]
    assert np.allclose(scored.scores[:, names.index("copy")], scored.scores[:, names.index("s0")], rtol=1e-6)
    check = next(each for each in check_unlearning(scored) if each.name == "redundant sources")
    assert check.verdict == "warn"
    assert check.value == 1
    assert "copy and s0 (100%)" in check.reading


def test_different_sources_are_not_flagged():
    data = with_sources(tokenized(40, 1, "t"), [f"s{row % 2}" for row in range(40)])
    assert find_overlaps(data, training_sources(data, 100)) == []


def test_a_source_within_a_larger_one_is_flagged():
    data = training_data(30, 1)
    part = with_sources(data.subset(range(8)), ["part"] * 8)
    both = joined(data, part)
    found = find_overlaps(both, training_sources(both, 100))
    assert [(each.one, each.other) for each in found] == [("part", "s0")]


def test_samples_are_spread_over_a_source():
    data = training_data(12, 2)
    assert [each.rows.tolist() for each in training_sources(data, 2)] == [[0, 10], [1, 11]]


def test_one_source_is_nothing_to_compare(tmp_path):
    with pytest.raises(DataError, match="--level example"):
        a_job(tmp_path, train=training_data(6, 1))


def test_queries_without_a_source_are_sets_of_their_own(tmp_path):
    data = query_data(4, 2)
    examples = [dataclasses.replace(data.examples[0], source=None), *data.examples[1:]]
    job = a_job(tmp_path, tests=dataclasses.replace(data, examples=examples))
    assert [(each.name, each.rows.tolist()) for each in job.tests.sets] == [
        ("q0", [0]),
        ("test1", [1, 3]),
        ("test0", [2]),
    ]


def test_a_test_set_without_targets_is_refused(tmp_path):
    data = query_data(2, 2)
    blank = dataclasses.replace(data, targets=[np.zeros_like(data.targets[0]), data.targets[1]])
    with pytest.raises(DataError, match="no token to explain"):
        a_job(tmp_path, tests=blank)


def test_an_unrelated_source_scores_below_those_that_share_text(tmp_path):
    tests = query_data(4, 1)
    data = joined(with_sources(tests, ["related"] * 4), with_sources(tokenized(8, 9, "u"), ["unrelated"] * 8))
    scored = Unlearning(a_job(tmp_path, train=data, tests=tests))
    names = [each.name for each in scored.job.train.sets]
    assert scored.scores[0, names.index("related")] > 2 * abs(scored.scores[0, names.index("unrelated")])
