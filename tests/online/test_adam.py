"""In-run scores of steps as Adam and AdamW take them, against gradients formed one by one and the loss itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.architectures import build
from tests.online.workbench import DATA, HELD_OUT, mean_loss, named, step_rows, validation
from tests.reference.online import flat_gradient, greedy_by_brute_force, sequence_loss, shares, validation_loss
from tests.training.workbench import trainer
from vestige.errors import IndexMismatch, SpecError, UserError
from vestige.online import OnlineAttribution, OnlineLog, attach

VALIDATION = range(3)
OPTIMIZERS = {
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.3}),
    "adam with a penalty": (torch.optim.Adam, {"weight_decay": 0.3, "betas": (0.8, 0.95)}),
}


def flat(values) -> torch.Tensor:
    return torch.cat([value.detach().flatten() for value in values])


def slope_of(model) -> torch.Tensor:
    return flat_gradient(validation_loss(model, HELD_OUT, VALIDATION), list(model.parameters()))


@pytest.mark.parametrize("name", ["gpt2", "llama-lora"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_scores_equal_gradients_formed_one_by_one(name, kind):
    """The tied embedding of GPT-2 has rows that no step touched before, whose mean of squares is zero until then."""
    model = build(name)
    parameters = [each for each in model.parameters() if each.requires_grad]
    make, given = OPTIMIZERS[kind]
    optimizer = make(parameters, lr=2e-3, **given)
    engine = OnlineAttribution(model, validation(3), optimizer=optimizer)
    beta = given.get("betas", (0.9, 0.999))[1]
    squares = torch.zeros(sum(each.numel() for each in parameters), dtype=torch.float64)
    for number in range(1, 4):
        rows = step_rows(number)
        slope = flat_gradient(validation_loss(model, HELD_OUT, VALIDATION), parameters)
        each = shares(model, DATA, rows, parameters)
        with engine.step(named(rows)) as step:
            mean_loss(model, DATA.batch(rows)).backward()
            norm = nn.utils.clip_grad_norm_(parameters, 0.2)
        each *= min(1.0, 0.2 / (float(norm) + 1e-6))
        penalty = 0.3 * flat(parameters) if "penalty" in kind else 0.0
        squares = beta * squares + (1 - beta) * (each.sum(0) + penalty) ** 2
        scale = 1 / ((squares / (1 - beta**number)).sqrt() + 1e-8)
        torch.testing.assert_close(step.result.score, each @ (scale * slope), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(step.result.influence, 2e-3 * step.result.score, rtol=1e-12, atol=0)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("order", [1, 2], ids=["first", "second"])
def test_the_sum_over_a_batch_is_the_change_of_a_tiny_step(order):
    """Without momentum the step is all that counts: halving the rate divides the error by four, or by eight."""

    def errors(rate: float) -> list[float]:
        model, found = build("gpt2"), []
        # A step is smooth in its rate where no entry is divided by almost nothing.
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, betas=(0.0, 0.9), eps=1e-3)
        engine = OnlineAttribution(model, validation(3), optimizer=optimizer, second_order=order == 2)
        for number in range(3):
            before = validation_loss(model, HELD_OUT, VALIDATION).item()
            optimizer.param_groups[0]["lr"] = rate
            with engine.step(named(step_rows(number))) as step:
                mean_loss(model, DATA.batch(step_rows(number))).backward()
            optimizer.step()
            optimizer.zero_grad()
            fall = before - validation_loss(model, HELD_OUT, VALIDATION).item()
            found.append(abs(float(step.result.influence.sum()) - fall))
        return found

    whole, half = errors(2e-5), errors(1e-5)
    assert np.array(whole) / np.array(half) == pytest.approx(2.0 ** (order + 1), rel=0.2)


@pytest.mark.parametrize("k", [1, 3])
def test_greats_selects_as_gradients_formed_one_by_one_do(k):
    model, rate, rows = build("gpt2"), 0.05, [1, 4, 2, 7, 5, 0, 9]
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=rate, eps=1e-4)
    squares = 0.0
    for number in range(2):
        mean_loss(model, DATA.batch(step_rows(number))).backward()
        squares = 0.999 * squares + 0.001 * flat(each.grad for each in parameters) ** 2
        optimizer.step()
        optimizer.zero_grad()
    losses = (sequence_loss(model, DATA.ids[row], DATA.targets[row]) / DATA.targets[row][1:].sum() for row in rows)
    gradients = torch.stack([flat_gradient(loss, parameters) for loss in losses])
    squares = (0.999 * squares + 0.001 * gradients.mean(0) ** 2) / (1 - 0.999**3)
    moves = rate / k * gradients / (squares.sqrt() + 1e-4)
    gains, overlaps = moves @ slope_of(model), moves @ moves.T
    found = OnlineAttribution(model, validation(3), optimizer=optimizer).select(DATA.batch(rows, 2), k)
    assert found.rows == greedy_by_brute_force(gains, overlaps, k)
    assert found.gains[0] == pytest.approx(gains[found.rows[0]].item(), rel=1e-8)
    if k > 1:
        first, second = found.rows[:2]
        assert found.gains[1] == pytest.approx((gains[second] - overlaps[first, second]).item(), rel=1e-8)


@pytest.mark.slow
def test_predicted_changes_are_the_actual_ones_step_by_step():
    """What momentum carries over is counted where it comes from; read forward, it predicts each step's change."""
    found = {}
    for kind in ("as-is", "sgd"):
        model = build("gpt2")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
        engine = OnlineAttribution(model, validation(3), optimizer=optimizer, score_optimizer=kind)
        carried, predicted, actual = 0.0, [], []
        for number in range(30):
            before = validation_loss(model, HELD_OUT, VALIDATION).item()
            with engine.step(named(step_rows(number))) as step:
                mean_loss(model, DATA.batch(step_rows(number))).backward()
            optimizer.step()
            optimizer.zero_grad()
            carried = 0.9 * carried + 0.1 * float(step.result.influence.sum())
            predicted.append(carried / (1 - 0.9 ** (number + 1)))
            actual.append(before - validation_loss(model, HELD_OUT, VALIDATION).item())
        found[kind] = np.corrcoef(predicted, actual)[0, 1], np.polyfit(predicted, actual, 1)[0]
    (correlation, slope), plain = found["as-is"], found["sgd"]
    assert correlation > 0.9
    assert 0.7 < slope < 1.3
    assert not 0.7 < plain[1] < 1.3


def test_what_cannot_be_scored_as_it_is_is_refused():
    model = build("gpt2")
    with pytest.raises(SpecError, match='give "as-is" or "sgd"'):
        OnlineAttribution(model, validation(1), score_optimizer="adam")
    for optimizer in (
        torch.optim.Adagrad(model.parameters()),
        torch.optim.Adam(model.parameters(), amsgrad=True),
    ):
        engine = OnlineAttribution(model, validation(1), optimizer=optimizer)
        with pytest.raises(SpecError, match='score_optimizer="sgd"'):
            engine.step(["one"])
        plain = OnlineAttribution(model, validation(1), optimizer=optimizer, score_optimizer="sgd")
        with plain.step(named([0])) as step:
            mean_loss(model, DATA.batch([0])).backward()
        assert step.result.score.isfinite().all()


def test_a_log_goes_on_as_it_was_scored(tmp_path):
    model = build("gpt2")
    optimizer = torch.optim.AdamW(model.parameters())
    given = {"optimizer": optimizer, "out": tmp_path / "log"}
    OnlineAttribution(model, validation(1), **given)
    with pytest.raises(IndexMismatch, match="other score optimizer"):
        OnlineAttribution(model, validation(1), **given, score_optimizer="sgd", start_step=3)
    header = json.loads((tmp_path / "log" / "log.json").read_text())
    # A log from before there was a choice was scored as plain gradient descent.
    del header["score_optimizer"]
    (tmp_path / "log" / "log.json").write_text(json.dumps(header))
    OnlineAttribution(model, validation(1), **given, score_optimizer="sgd")
    with pytest.raises(IndexMismatch, match="other score optimizer"):
        OnlineAttribution(model, validation(1), **given)


DISTRIBUTED = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1, "steps": 3, "name": "llama"}


def without_dropout(given):
    for module in given.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    return given


@pytest.mark.slow
def test_the_scores_of_two_processes_are_gathered(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run = subprocess.run(
        [*torchrun, "-m", "tests.online.test_adam", str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    alone = without_dropout(trainer(tmp_path / "alone", **DISTRIBUTED))
    expected = attach(alone, validation(2), out=tmp_path / "alone-log")
    alone.train()
    found, whole = OnlineLog.open(tmp_path / "log").table(), expected.engine.log.table()
    order = [("step", "ascending"), ("id", "ascending")]
    found, whole = found.sort_by(order), whole.sort_by(order)
    assert found["id"].to_pylist() == whole["id"].to_pylist()
    for name in ("score", "influence", "validation_loss"):
        np.testing.assert_allclose(found[name].to_numpy(), whole[name].to_numpy(), rtol=2e-3, atol=1e-4)


def test_what_several_processes_cannot_do_is_refused(tmp_path, monkeypatch):
    given = trainer(tmp_path)
    monkeypatch.setattr(type(given.args), "world_size", 2)
    with pytest.raises(UserError, match="batch of one process"):
        attach(given, validation(1), select=2)
    given.is_fsdp_enabled = True
    with pytest.raises(UserError, match="train with DDP"):
        attach(given, validation(1))


def main(folder: Path) -> None:
    """One of two processes: half of every batch, and the scores of all of it."""
    torch.set_num_threads(1)
    given = without_dropout(trainer(folder / "out", **DISTRIBUTED, per_device_train_batch_size=2))
    attach(given, validation(2), out=folder / "log")
    given.train()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
