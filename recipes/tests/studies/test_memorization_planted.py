"""What is planted is found, at a small size."""

import json

import numpy as np
import pytest
import torch

from vestige.errors import CorruptFile, IndexMismatch, SpecError
from vestige.measures import attack, bank_evidence
from vestige_recipes import study
from vestige_recipes.memorization import planted as room
from vestige_recipes.memorization.judging import SUCCESS, TELLING, mean_interval
from vestige_recipes.memorization.planted import PlantedPlan, draw_points, plant
from vestige_recipes.memorization.targets import keep_measures, read_measures, target_file

TINY = room.PLANS["tiny"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("planted")


@pytest.fixture(scope="module")
def report(folder):
    return study("memorization-planted", size="tiny", out=folder / "study", seeds=1)


@pytest.fixture(scope="module")
def made(report, folder):
    """As the study left it: nothing is trained again."""
    return plant(TINY, 0, folder / "study" / "seed-0")


@pytest.fixture(scope="module")
def judged(made):
    return room.judge(made, 0)


def test_a_r3_flips_and_outliers_are_predicted_early_and_psmi_is_ahead(judged):
    found = judged.early[room.BOTH]
    assert found["psmi"].mean() >= 0.95
    assert found["psmi"].mean() >= found["loss"].mean() + 0.05
    assert judged.early["flips"]["loss"].mean() >= 0.95


def test_a_r3_the_attack_succeeds_on_flips_and_is_too_good_in_sample(made, judged):
    assert np.nanmean(judged.proved[SUCCESS][judged.kinds["flips"]]) >= 0.95
    too_good = judged.proved["attack success, in-sample minus leave-one-out"]
    assert np.nanmean(too_good[judged.kinds["clean"]]) > 0.02
    assert not np.isinf(bank_evidence(made.bank, of="gap").lira).any()
    planted = judged.kinds["flips"] | judged.kinds["outliers"]
    assert attack(judged.proved["counterfactual memorization"], planted).auc.value > 0.9


def test_a_r5_membership_that_is_shuffled_is_not_found(judged):
    assert judged.late["membership of all"]["lira"].mean() > 0.6
    assert abs(judged.null.mean() - 0.5) < 0.05


def test_every_gate_of_the_study_is_computed_from_what_was_judged(judged):
    gates = {gate.name: gate for gate in room.gates_of([judged])}
    assert len(gates) == 9
    flips = gates["PSMI at the trigger: AUC of flips"]
    assert flips.seen == pytest.approx(judged.early["flips"]["psmi"].mean())
    lead = next(gate for name, gate in gates.items() if "above the loss" in name)
    assert lead.passed
    hits, count = judged.flagged["planted"]
    assert gates["PSMI <= 0: true positives among planted points"].seen == hits / count
    spoilt = room.gates_of([judged, judged._replace(not_finite=1, null=np.array([0.7, 0.7]))])
    assert not next(gate for gate in spoilt if gate.name == "scores that are not finite").passed
    assert not next(gate for gate in spoilt if "shuffled" in gate.name).passed


def test_the_early_measures_are_of_the_targets_own_points_at_the_trigger(made):
    for own, early, epoch in zip(made.bank.membership, made.early, made.moments, strict=True):
        assert {len(values) for values in early.values()} == {own.sum()}
        assert 0 < epoch < TINY.epochs
        # Trained to the trigger only: half of the points have lost 19 of 20 parts of their loss, and no more is asked.
        assert np.median(early["loss"]) < 0.05 * np.log(4) * 1.1


def test_points_are_planted_as_said_and_differ_between_seeds():
    points, again, other = (draw_points(TINY, seed) for seed in (0, 0, 1))
    assert torch.equal(points.inputs, again.inputs)
    assert not torch.equal(points.inputs, other.inputs)
    assert points.flipped.sum() == points.outlying.sum() == TINY.planted
    assert not (points.flipped & points.outlying).any()
    norms = points.inputs.norm(dim=1).numpy()
    assert norms[points.outlying].min() > np.quantile(norms[~points.outlying], 0.99)


@pytest.mark.slow
def test_the_study_leaves_table_and_figure_and_goes_on_where_it_was(report, folder):
    out = folder / "study"
    assert report.gates == ()
    record = json.loads((out / "study.json").read_text())
    assert record["details"]["seeds"][0]["not_finite"] >= 0
    assert (out / "planted.png").read_bytes().startswith(b"\x89PNG")
    measures = {row[1] for row in report.rows if row[0] == f"AUC of {room.BOTH}, at the trigger"}
    assert measures == set(room.PREDICTORS)
    measures = {row[1] for row in report.rows if row[0] == "AUC of membership of flips, at the end"}
    assert measures == {*room.PREDICTORS, "lira", "lira_offline"} - {"early_lira"}
    assert {row[1] for row in report.rows if row[0] == "AUC of flips, at the end"} == set(TELLING)
    files = {path: path.stat().st_mtime_ns for path in out.rglob("*.parquet")}
    again = study("memorization-planted", size="tiny", out=out, seeds=1)
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert again.rows == report.rows


def test_a_changed_seed_of_the_points_or_a_lost_file_is_not_passed_over(report, folder, tmp_path):
    with pytest.raises(IndexMismatch):
        plant(PlantedPlan(240, 12, 8, 31, 200), 0, folder / "study" / "seed-0")
    with pytest.raises(CorruptFile, match="Delete the study's folder"):
        read_measures(tmp_path / "absent.parquet")
    with pytest.raises(SpecError, match="no size paper"):
        study("memorization-planted", size="paper", out=tmp_path / "paper")


def test_measures_come_back_as_they_were_kept(tmp_path):
    path = target_file(tmp_path / "early", np.array([1, 3]))
    assert path != target_file(tmp_path / "early", np.array([1, 4]))
    keep_measures(path, ["a", "b"], {"psmi": np.array([0.5, np.nan])}, 7)
    ids, found, step = read_measures(path)
    assert (ids, step) == (["a", "b"], 7)
    np.testing.assert_array_equal(found["psmi"], [0.5, np.nan])


def test_an_interval_over_targets_leaves_out_what_is_not_known():
    found = mean_interval(np.array([0.8, np.nan, 0.9, 1.0]))
    assert found.value == pytest.approx(0.9)
    assert 0.8 <= found.low < found.value < found.high <= 1.0
    assert np.isnan(mean_interval(np.array([np.nan])).value)
