"""What is planted is found, at a small size of benchmarks/planted_memorization.py."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from vestige import audit

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def study():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import planted_memorization
    finally:
        sys.path.remove(str(BENCHMARKS))
    torch.set_num_threads(1)
    return planted_memorization


@pytest.fixture(scope="module")
def made(study, tmp_path_factory):
    return study.plant(study.QUICK, 0, tmp_path_factory.mktemp("planted") / "bank")


@pytest.fixture(scope="module")
def evidence(made):
    return audit.bank_evidence(made.bank, of="gap")


def test_a_r3_flips_and_outliers_are_predicted_early_and_psmi_is_ahead(study, made, evidence):
    found = study.areas(made, evidence)["flips + outliers"]
    assert found["psmi"].mean() >= 0.95
    assert found["psmi"].mean() >= found["loss"].mean() + 0.05
    assert study.areas(made, evidence)["flips"]["loss"].mean() >= 0.95


def test_a_r3_the_attack_succeeds_on_flips_and_is_too_good_in_sample(made, evidence):
    inside = audit.lira_in_sample(made.bank.values("example_gap"), made.bank.membership)
    flipped, clean = made.points.flipped, ~(made.points.flipped | made.points.outlying)
    assert np.nanmean(evidence.success.success[flipped]) >= 0.95
    assert np.nanmean(inside.success[clean]) > np.nanmean(evidence.success.success[clean]) + 0.02
    assert not np.isinf(evidence.lira).any()
    assert audit.attack(evidence.counterfactual, ~clean).auc.value > 0.9


def test_a_r5_membership_that_is_shuffled_is_not_found(made):
    membership, draw = made.bank.membership, np.random.default_rng(0)
    shuffled = np.stack([draw.permutation(row) for row in membership])
    null = audit.lira_of_members(made.bank.values("example_gap"), shuffled)
    assert abs(audit.attack(null.ravel(), shuffled.ravel()).auc.value - 0.5) < 0.05
