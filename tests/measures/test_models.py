"""What many models prove: LiRA, counterfactual memorization, banks."""

import math

import numpy as np
import pytest

from tests.reference import audit as reference
from vestige import measures
from vestige.banks import bank_of
from vestige.errors import DataError

MEMBERS, EXAMPLES = 12, 40


def halves(effect=0.0, members=MEMBERS, examples=EXAMPLES, seed=0):
    draw = np.random.default_rng(seed)
    membership = draw.random((members, examples)) < 0.5
    return draw.normal(size=(members, examples)) + effect * membership, membership


def as_numbers(rows):
    return [math.nan if value is None else value for value in rows]


@pytest.mark.parametrize("shrinkage", [0.0, 4.0])
def test_lira_is_the_log_of_the_ratio_of_gaussians(shrinkage):
    values, membership = halves(1.0)
    membership[:, 0] = False
    membership[1, 0] = True
    target = values[0] + 0.3
    wanted = as_numbers(
        reference.lira(target.tolist(), values.tolist(), membership.tolist(), range(MEMBERS), shrinkage)
    )
    found = measures.lira(target, values, membership, shrinkage=shrinkage)
    np.testing.assert_allclose(found.score, wanted, rtol=1e-9)
    assert found.uncomputable == 1
    assert np.isnan(found.score[0])


def test_a4_2_lira_is_finite_far_out_and_clamps_nothing():
    values, membership = halves()
    found = measures.lira(np.full(EXAMPLES, 1e3), values, membership)
    assert np.isfinite(found.score).all()
    assert abs(found.score).max() > 1000
    offline = measures.lira_offline(np.full(EXAMPLES, 1e3), values, membership)
    assert np.isfinite(offline.score).all()
    assert (offline.score > 1e4).all()


def test_a4_2_what_cannot_be_computed_is_nan_and_counted_not_a_verdict():
    values, membership = halves()
    membership[:, 3] = True  # No model without it.
    membership[:, 4] = False  # None with it.
    values[:, 5] = np.nan
    target = values[0].copy()
    target[6] = np.inf
    found = measures.lira(target, values, membership)
    assert found.uncomputable == 4
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(found.score)), [3, 4, 5, 6])
    assert np.isnan(measures.counterfactual(values, membership)[[3, 4, 5]]).all()
    assert measures.lira_offline(target, values, membership).uncomputable == 3  # Without members it does not need any.
    # All models alike: no spread, no ratio.
    assert measures.lira(np.zeros(EXAMPLES), np.zeros_like(values), membership).uncomputable == EXAMPLES


def test_offline_lira_is_the_tail_of_the_models_without_the_example():
    values, membership = halves()
    found = measures.lira_offline(values[0] + 1, values, membership, shrinkage=0.0).score
    for example in range(EXAMPLES):
        out = values[~membership[:, example], example]
        z = (values[0, example] + 1 - out.mean()) / out.std(ddof=1)
        assert found[example] == pytest.approx(-math.log(0.5 * math.erfc(z / math.sqrt(2))), rel=1e-9)


def test_every_member_is_judged_by_the_others_alone():
    values, membership = halves(1.0)
    found = measures.lira_of_members(values, membership)
    for target in range(MEMBERS):
        others = [member for member in range(MEMBERS) if member != target]
        wanted = reference.lira(values[target].tolist(), values.tolist(), membership.tolist(), others, 4.0)
        np.testing.assert_allclose(found[target], as_numbers(wanted), rtol=1e-9)


def test_members_of_the_targets_subset_are_no_judges():
    values, membership = halves()
    twice, twins = np.repeat(values, 2, axis=0), np.repeat(membership, 2, axis=0)
    subsets = np.repeat(np.arange(MEMBERS), 2)
    found = measures.lira_of_members(twice, twins, subsets=subsets)
    np.testing.assert_array_equal(found[::2], found[1::2])
    alone = measures.lira(twice[0], twice, twins, left_out=subsets == 0)
    np.testing.assert_array_equal(found[0], alone.score)


def test_a4_3_global_success_is_leave_one_out_and_chance_on_noise():
    values, membership = halves(members=16, examples=2000)
    found, inside = measures.lira_global(values, membership), measures.lira_in_sample(values, membership)
    # Standard error of the mean: 0.5 / sqrt(16 * 2000) = 0.003.
    assert abs(np.nanmean(found.success) - 0.5) < 0.015
    assert np.nanmean(inside.success) > 0.55  # What the published number had in it.


def test_a4_3_the_first_member_is_a_judge_and_is_judged():
    values, membership = halves(1.0)
    found = measures.lira_global(values, membership)
    order = np.random.default_rng(1).permutation(MEMBERS)
    again = measures.lira_global(values[order], membership[order])
    np.testing.assert_allclose(found.success, again.success)
    assert found.judged.max() == MEMBERS
    inside, outside = (
        np.array([np.mean([values[m, i] for m in range(MEMBERS) if membership[m, i] == side]) for i in range(EXAMPLES)])
        for side in (True, False)
    )
    np.testing.assert_allclose(measures.counterfactual(values, membership), inside - outside)
    np.testing.assert_allclose(measures.simplicity(values, membership), inside + outside)


def test_a_r5_shuffled_membership_is_chance():
    values, membership = halves(3.0, members=16, examples=300)
    real = measures.attack(measures.lira_of_members(values, membership).ravel(), membership.ravel())
    assert real.auc.value > 0.9
    draw = np.random.default_rng(1)
    shuffled = np.stack([draw.permutation(row) for row in membership])
    null = measures.attack(measures.lira_of_members(values, shuffled).ravel(), shuffled.ravel())
    assert abs(null.auc.value - 0.5) < 0.05


def test_arrays_that_do_not_agree_are_refused():
    values, membership = halves()
    with pytest.raises(DataError, match="member, example"):
        measures.counterfactual(values, membership[:, 1:])
    with pytest.raises(DataError, match="of int64"):
        measures.counterfactual(values, membership.astype(np.int64))
    with pytest.raises(DataError, match="target"):
        measures.lira(values[0, 1:], values, membership)
    with pytest.raises(DataError, match="left_out"):
        measures.lira(values[0], values, membership, left_out=np.zeros(3, dtype=bool))


def planted(rows, seed, *, noise=0.0):
    """A model that knows the rows it was trained on better, the first five of them much better."""
    draw = np.random.default_rng(seed)
    values = draw.normal(size=30)
    values[rows] += np.where(rows < 5, 8.0, 0.0)
    return {"query_loss": np.zeros(1), "example_margin": values, "example_loss": -values}


def test_a_bank_gives_all_its_evidence(tmp_path):
    bank = bank_of(planted, examples=30, queries=1, out=tmp_path, settings={"epochs": 1}, subsets=12, seeds=2)
    found = measures.bank_evidence(bank)
    assert found.lira.shape == (24, 30)
    assert found.uncomputable == 0
    assert found.counterfactual[:5].min() > found.counterfactual[5:].max()
    assert found.success.success[:5].min() > 0.95
    np.testing.assert_array_equal(measures.bank_evidence(bank, of="loss").lira, found.lira)
    with pytest.raises(DataError, match="no example_gap"):
        measures.bank_evidence(bank, of="gap")


def test_a4_6_banks_of_different_epochs_have_different_ids(tmp_path):
    short, long = (
        bank_of(planted, examples=30, queries=1, out=tmp_path / name, settings={"epochs": count}, subsets=2, seeds=1)
        for name, count in (("short", 1), ("long", 2))
    )
    assert short.id != long.id
