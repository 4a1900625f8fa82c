import json

import numpy as np
import pytest
import torch
from tests.reference import leave_one_out as reference
from torch import nn

from vestige.curvature import DAMPING, DataInf, mean_eigenvalues
from vestige.evaluate import Estimate, Lds
from vestige_recipes import study
from vestige_recipes.digits import run as room
from vestige_recipes.digits.run import PENALTY, leave_one_out
from vestige_recipes.digits.scores import (
    Gradients,
    ImageCurvature,
    average_models,
    digits,
    exact_influence,
    gradients,
    measure_gradients,
    network,
    query_losses,
    with_sampled_labels,
)
from vestige_recipes.studies import StudySettings


@pytest.fixture(scope="module")
def data():
    return digits(60, 12, 0)


@pytest.fixture(scope="module")
def model(data):
    return network(data.train, 3, 3, (6, 5)).double()


@pytest.fixture(scope="module")
def wide(data):
    """The digits in float64."""
    return data._replace(**{side: part._replace(inputs=part.inputs.double()) for side, part in data._asdict().items()})


@pytest.fixture(scope="module")
def by_autograd(model, wide):
    """One example's gradient after another, weight by weight and flattened, training and queries."""
    found = []
    for images in wide:
        rows = []
        for pixels, label in zip(*images, strict=True):
            loss = nn.functional.cross_entropy(model(pixels[None]), label[None])
            parts = torch.autograd.grad(loss, list(model.parameters()))
            rows.append(torch.cat([part.flatten() for part in parts]))
        found.append(torch.stack(rows))
    return found


def test_gradients_of_images_are_those_of_autograd(model, wide, by_autograd):
    for images, expected in zip(wide, by_autograd, strict=True):
        torch.testing.assert_close(torch.cat(gradients(model, images), dim=1), expected)


def test_exact_influence_is_a_dense_solve_at_every_damping(by_autograd):
    train, queries = by_autograd
    found, _ = exact_influence(Gradients(train.float(), queries.float(), 0.0))
    fisher = train.T @ train / len(train)
    unit, largest = float(fisher.diagonal().mean()), float(torch.linalg.eigvalsh(fisher)[-1])
    assert next(iter(found)) == DAMPING
    for damping, scored in found.items():
        inverse = torch.linalg.inv(fisher + damping * unit * torch.eye(len(fisher), dtype=torch.float64))
        expected = (queries @ inverse @ train.T).numpy()
        # The matrix is added up in float32, whose rounding the inverse amplifies by its condition number.
        condition = 1 + largest / (damping * unit)
        np.testing.assert_allclose(scored.scores, expected, rtol=1e-5, atol=1e-7 * condition * np.abs(expected).max())


def test_datainf_over_images_is_its_formula(model, wide, by_autograd):
    measured = ImageCurvature.over(model, wide.train)
    sizes = [part.size for part in measured.components]
    found = DataInf.with_damping(measured, mean_eigenvalues(measured), 0.5).precondition(
        by_autograd[1].split(sizes, dim=1)
    )
    for part, rows, vectors in zip(
        found, by_autograd[0].split(sizes, dim=1), by_autograd[1].split(sizes, dim=1), strict=True
    ):
        damping = 0.5 * float((rows**2).sum() / len(rows) / rows.shape[1])
        eye = damping * torch.eye(rows.shape[1], dtype=torch.float64)
        inverse = torch.stack([torch.linalg.inv(torch.outer(row, row) + eye) for row in rows]).mean(0)
        torch.testing.assert_close(part, vectors @ inverse, rtol=1e-6, atol=1e-8)


def test_labels_are_drawn_from_the_model_and_the_inputs_stay(model, wide):
    drawn = [with_sampled_labels(model, wide.train, seed).labels for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    sure = nn.Linear(64, 10).double()
    with torch.no_grad():
        sure.weight.zero_()
        sure.bias.copy_(torch.eye(10, dtype=torch.float64)[4] * 100)
    assert with_sampled_labels(sure, wide.train, 0).labels.unique().tolist() == [4]


def test_trak_of_one_model_is_its_formula(data):
    # So few weights that nothing is projected away.
    model = network(data.train, 3, 3, (4, 4))
    found = measure_gradients(model, data)
    assert found.train.shape[1] < 1024
    (trak,) = average_models([model], data, 0, "1 model")
    doubts = [torch.from_numpy(1 - np.exp(-query_losses(model, images))) for images in data]
    train, queries = found.train.double() / doubts[0][:, None], found.queries.double() / doubts[1][:, None]
    kernel = train.T @ train / len(train)
    kernel += float(kernel.diagonal().mean()) * torch.eye(len(kernel), dtype=torch.float64)
    expected = (queries @ torch.linalg.solve(kernel, train.T) * doubts[0]).numpy()
    np.testing.assert_allclose(trak.scores, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_training_is_repeatable_and_leaves_the_generator_alone(data):
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    losses = [query_losses(network(data.train, seed, 1, (4, 4)), data.queries) for seed in (5, 5, 6)]
    assert torch.equal(torch.rand(3), expected)
    np.testing.assert_array_equal(losses[0], losses[1])
    assert not np.array_equal(losses[0], losses[2])


@pytest.mark.slow
def test_predicted_and_true_leave_one_out_agree_with_exact_curvature():
    data = digits(300, 40, 0)
    found = leave_one_out(data, 15)
    assert found.agreement > 0.99
    (inputs, labels), (asked, answers) = ((images.inputs.double().numpy(), images.labels.numpy()) for images in data)
    before = reference.losses(reference.fitted(inputs, labels, np.ones(300), PENALTY, 10), asked, answers)
    for row in (0, 14):
        kept = np.arange(300) != row
        after = reference.losses(reference.fitted(inputs, labels, kept, PENALTY, 10), asked, answers)
        np.testing.assert_allclose(found.true[:, row], after - before, atol=1e-7)


@pytest.mark.slow
def test_the_tiny_study_leaves_its_table_its_figure_and_a_bank_that_is_not_made_again(tmp_path):
    report = study("digits", size="tiny", out=tmp_path / "digits")
    names = [row[0] for row in report.rows]
    assert names[0] == "noise ceiling"
    assert names[1] == f"influence, exact, damping {DAMPING:g}"
    assert {"grad-dot", "grad-cos", "ekfac", "kfac", "datainf", "trak, 1 model", "random"} <= set(names)
    assert report.gates == ()
    record = json.loads((tmp_path / "digits" / "study.json").read_text())
    assert len(record["details"]["methods"]) == len(names) - 1
    assert (tmp_path / "digits" / "digits.png").read_bytes().startswith(b"\x89PNG")
    members = {path: path.stat().st_mtime_ns for path in (tmp_path / "digits" / "bank").rglob("*.parquet")}
    again = study("digits", size="tiny", out=tmp_path / "digits")
    assert {path: path.stat().st_mtime_ns for path in members} == members
    assert [row[:4] for row in again.rows] == [row[:4] for row in report.rows]


def test_the_damping_that_was_chosen_is_judged_on_queries_that_had_no_part_in_it(tmp_path):
    plan = room.PLANS["tiny"]
    data = digits(plan.examples, plan.queries, 0)
    scored = [each for each in _tiny_scores(tmp_path, plan, data) if each.name.startswith(room.BEST)]
    assert len(scored) == 1
    blank = np.isnan(scored[0].scores).all(1)
    assert blank.sum() == plan.queries // 10
    assert not np.isnan(scored[0].scores[~blank]).any()


def _tiny_scores(folder, plan, data):
    settings = StudySettings.model_validate({"name": "digits", "size": "tiny", "out": folder})
    truth = room._bank(settings, plan, data)
    return room._all_scores(settings, plan, data, network(data.train, 1_000, 2, plan.hidden), truth)


def test_gates_fail_for_intervals_that_overlap_and_for_sketches_that_lose():
    def judged(name, value, low, high, nrmse=None):
        scored = room.Scored(name, np.zeros((1, 1)), 0.0, 1024, nrmse)
        own = () if nrmse is None else (nrmse,)
        return name, room.Judged(scored, Lds(Estimate(value, low, high), np.zeros(1), 0, ()), (value,), own)

    good = [
        judged("influence, exact, damping 1", 0.37, 0.3, 0.42),
        judged("grad-dot", 0.18, 0.12, 0.25),
        judged("influence, GraSS x4 1024", 0.365, 0.3, 0.42, 0.9),
        judged("influence, SJLT 1024", 0.365, 0.3, 0.42, 1.2 / 32),
    ]
    assert all(gate.passed for gate in room._gates(dict(good), 0.995))
    bad = [
        judged("influence, exact, damping 1", 0.37, 0.2, 0.5),
        judged("grad-dot", 0.3, 0.22, 0.38),
        judged("influence, GraSS x4 1024", 0.3, 0.2, 0.4),
        judged("influence, SJLT 1024", 0.365, 0.3, 0.42, 1.4 / 32),
    ]
    assert not any(gate.passed for gate in room._gates(dict(bad), 0.98))


@pytest.mark.slow
def test_draws_of_a_sketch_differ_and_their_mean_is_what_the_gate_sees(tmp_path):
    plan = room.PLANS["tiny"]
    data = digits(plan.examples, plan.queries, 0)
    found = [each for each in _tiny_scores(tmp_path, plan, data) if each.name == "influence, SJLT 16"]
    assert [each.draw for each in found] == list(range(plan.sketches))
    assert not np.array_equal(found[0].scores, found[1].scores)
    truth = room._bank(StudySettings(name="digits", size="tiny", out=tmp_path), plan, data)
    (judged,) = room._all_judged(iter(found), truth, plan)
    np.testing.assert_array_equal(judged.scored.scores, found[0].scores)
    assert judged.by_draw == tuple(room.judge_scores(each.scores, truth, 0).estimate.value for each in found)
    assert judged.nrmse == tuple(each.nrmse for each in found)


def test_the_interval_over_draws_is_students():
    # Four values with mean 2.5 and variance 5/3; the 97.5th percentile of t with three degrees is 3.182.
    found = room.over_draws([1.0, 2.0, 3.0, 4.0])
    assert found.value == 2.5
    assert found.high - found.value == pytest.approx(3.1824 * (5 / 3) ** 0.5 / 2, rel=1e-4)
    assert found.value - found.low == pytest.approx(found.high - found.value)
    assert np.isnan(room.over_draws([1.0]).low)


@pytest.mark.slow
def test_workers_share_the_bank(tmp_path, capfd):
    """The flag is not merely accepted: other processes train the networks, to the same losses."""
    plan = room.PLANS["tiny"]
    shown = digits(plan.examples, plan.queries, 0)
    one, two = (
        room._bank(StudySettings(name="digits", size="tiny", out=tmp_path / str(count), workers=count), plan, shown)
        for count in (1, 2)
    )
    assert "Bank: 2 workers" in capfd.readouterr().err
    assert np.array_equal(one.query_losses, two.query_losses)
