"""Banks of models that are no language models, trained by a function of the caller's."""

import numpy as np
import pytest

from vestige.banks import Bank, bank_of
from vestige.errors import DataError, IndexMismatch, PieceFailed, SpecError

EXAMPLES, QUERIES = 30, 4


def ridge(rows, seed):
    """Ridge regression on fixed random data, its labels shaken by the seed; squared errors of the queries."""
    draw = np.random.default_rng(0)
    inputs, weights, tests = draw.normal(size=(EXAMPLES, 3)), draw.normal(size=3), draw.normal(size=(QUERIES, 3))
    labels = inputs @ weights + 0.01 * np.random.default_rng(seed).normal(size=EXAMPLES)
    fitted = np.linalg.solve(inputs[rows].T @ inputs[rows] + np.eye(3), inputs[rows].T @ labels[rows])
    return (tests @ (fitted - weights)) ** 2


def build(out, train=ridge, **change):
    settings = {"settings": {"ridge": 1.0}, "subsets": 6, "seeds": 2, **change}
    return bank_of(train, examples=EXAMPLES, queries=QUERIES, out=out, **settings)


def test_losses_are_what_the_function_returns_for_the_rows(tmp_path):
    calls = []

    def recorded(rows, seed):
        calls.append((rows.tolist(), seed))
        return ridge(rows, seed)

    made = build(tmp_path, recorded)
    assert made.query_losses.shape == (12, QUERIES)
    for member, (rows, seed) in enumerate(calls):
        assert np.flatnonzero(made.membership[member]).tolist() == rows
        np.testing.assert_array_equal(made.query_losses[member], ridge(np.array(rows), seed))
    assert len({seed for _, seed in calls}) == 12
    build(tmp_path, recorded, subsets=8)
    assert len(calls) == 16


@pytest.mark.slow
def test_fifty_members_become_a_hundred_and_the_first_fifty_stay(tmp_path):
    few = build(tmp_path, subsets=50, seeds=1)
    many = build(tmp_path, subsets=100, seeds=1)
    np.testing.assert_array_equal(many.query_losses[:50], few.query_losses)
    np.testing.assert_array_equal(many.membership[:50], few.membership)
    np.testing.assert_array_equal(Bank.open(tmp_path).query_losses, many.query_losses)


def test_losses_that_are_not_finite_are_reported_and_the_others_go_on(tmp_path):
    broken = []

    def sometimes(rows, seed):
        losses = ridge(rows, seed)
        if 7 in rows and not broken:
            broken.append(rows)
            losses[2] = np.nan
        elif 7 in rows and len(broken) == 1:
            broken.append(rows)
            raise ArithmeticError("cannot fit")
        return losses

    with pytest.raises(PieceFailed) as failed:
        build(tmp_path, sometimes)
    message = str(failed.value)
    assert "2 of 12 pieces failed" in message
    assert "the others went on" in message
    assert "query_loss is not finite in 1 positions, the first in row 2" in message
    assert "ArithmeticError: cannot fit" in message
    assert len(list((tmp_path / "launch" / "bank" / "failures").glob("*.json"))) == 2
    assert len(Bank.open(tmp_path, allow_missing=True)) == 10
    assert len(build(tmp_path, sometimes)) == 12


def test_a_function_or_a_setting_that_changed_is_refused(tmp_path):
    build(tmp_path)
    with pytest.raises(IndexMismatch, match=r"ridge +1.0 +2.0"):
        build(tmp_path, settings={"ridge": 2.0})
    with pytest.raises(IndexMismatch, match="function"):
        build(tmp_path, lambda rows, seed: ridge(rows, seed))
    with pytest.raises(IndexMismatch, match=r"seed +0 +1"):
        build(tmp_path, seed=1)
    assert build(tmp_path, settings={"ridge": 2.0}, overwrite=True).identity["ridge"] == 2.0


def test_sources_lists_and_single_examples_are_left_out(tmp_path):
    sources = [f"s{row % 3}" for row in range(EXAMPLES)]
    made = build(tmp_path / "sources", sources=sources, leave_source_out=True)
    assert made.subset_names == ["everything", "s0", "s1", "s2"]
    assert made.sources == sources
    lists = build(tmp_path / "lists", leave_out={"few": [1, 2]})
    assert np.flatnonzero(~lists.membership[-1]).tolist() == [1, 2]
    assert build(tmp_path / "one", leave_one_out=5, seeds=1).membership.sum(axis=1).tolist() == [30, *[29] * 5]


def test_more_than_losses_can_be_stored_and_wrong_shapes_are_refused(tmp_path):
    def several(rows, seed):
        return {"query_loss": ridge(rows, seed), "example_margin": np.arange(EXAMPLES)}

    made = build(tmp_path / "several", several)
    assert made.example_margins.shape == (12, EXAMPLES)
    for wrong, message in (
        (lambda rows, seed: np.zeros(3), r"query_loss has shape \(3,\), expected one value for each of 4"),
        (lambda rows, seed: {"speed": np.zeros(4)}, "'speed' is nothing that a bank stores"),
    ):
        with pytest.raises(DataError, match=message):
            build(tmp_path / "wrong", wrong, overwrite=True)
    with pytest.raises(SpecError, match="names that the bank itself uses"):
        build(tmp_path / "clash", settings={"seed": 3})
    with pytest.raises(SpecError, match="not JSON serializable"):
        build(tmp_path / "object", settings={"model": ridge})
    with pytest.raises(SpecError, match="There are 2 sources for 30"):
        build(tmp_path / "sources", sources=["a", "b"])
    with pytest.raises(SpecError, match="a bank of their own"):
        build(tmp_path / "both", leave_one_out=2, leave_out={"a": [1]})


@pytest.mark.slow
def test_subset_sums_of_a_datamodel_predict_losses_of_subsets_that_it_has_not_seen(tmp_path):
    made = build(tmp_path, subsets=200, seeds=1)
    inside, losses = made.subset_membership - 0.5, made.query_losses - made.query_losses[:150].mean(axis=0)
    weights = np.linalg.solve(inside[:150].T @ inside[:150] + 3 * np.eye(EXAMPLES), inside[:150].T @ losses[:150])
    predicted = inside[150:] @ weights
    agreement = [np.corrcoef(predicted[:, query], losses[150:, query])[0, 1] for query in range(QUERIES)]
    assert min(agreement) > 0.6
