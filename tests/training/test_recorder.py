import json
import random
import warnings

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from tests.training.workbench import DATA, Seen, rows, same_bits, slow_loss, trainer
from vestige.curvature import read_adam
from vestige.errors import DataError, IndexMismatch, UserError
from vestige.models import load_model
from vestige.training import Alarm, Recorder, TrainingRun

COUNT = len(DATA.ids)
RINGS = Alarm(measure="gap", below=0.999, window=4)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings", "alarm"),
    [
        ("gpt2", {}, None),
        ("gpt2", {}, RINGS),
        ("llama-lora", {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1}, RINGS),
        ("llama-tied", {"bf16": True}, RINGS),
    ],
    ids=["silent", "alarm", "lora-accumulation-clipping-alarm", "bfloat16-alarm"],
)
def test_the_trainer_trains_the_same_bit_for_bit(tmp_path, name, settings, alarm):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PEFT on a head that is adapted
        plain = trainer(tmp_path / "a", name, **settings)
        expected = plain.train()
        after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
        watched = trainer(tmp_path / "b", name, **settings)  # a Trainer sets the seeds when it is made
        Recorder(watched, tmp_path / "record", checkpoints="0,0.34,...", alarm=alarm)
        found = watched.train()
    assert found.training_loss == expected.training_loss
    assert same_bits(plain.model, watched.model)
    states = zip(plain.optimizer.state.values(), watched.optimizer.state.values(), strict=True)
    assert all(torch.equal(one["exp_avg_sq"], other["exp_avg_sq"]) for one, other in states)
    assert torch.equal(torch.get_rng_state(), after[0])
    assert np.random.get_state()[1].tolist() == after[1]
    assert random.getstate() == after[2]
    run = TrainingRun.open(tmp_path / "record")
    assert (run.at_risk is not None) == (alarm is not None)
    assert len(run.checkpoints) > 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["datasets", "list", "without-ids"])
def test_order_and_rates_are_what_the_training_really_did(tmp_path, kind):
    data = {
        "datasets": Dataset.from_list(rows()),
        "list": rows(),
        "without-ids": Dataset.from_list(rows()).remove_columns("id"),
    }[kind]
    given = trainer(tmp_path / "out", data=data, steps=4, warmup_steps=2)
    seen = Seen(given)
    Recorder(given, tmp_path / "record")
    given.train()
    table = TrainingRun.open(tmp_path / "record").steps
    ids = table["example_id"].to_pylist()
    assert table["step"].to_pylist() == [step for step in (1, 2, 3, 4) for _ in range(4)]
    assert ids[:COUNT] != sorted(ids[:COUNT])
    for name, tokens in zip(ids, seen.tokens, strict=True):
        wanted = DATA.ids[int(name.removeprefix("doc-"))].tolist()
        assert tokens[: len(wanted)] == wanted
    assert table["learning_rate"].to_pylist() == [rate for rate in seen.rates for _ in range(4)]


@pytest.mark.slow
def test_losses_of_the_steps_and_of_the_checkpoints_are_those_of_the_weights(tmp_path):
    given = trainer(tmp_path / "out", "llama", steps=3)
    for module in given.model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    Recorder(given, tmp_path / "record", checkpoints="0,0.34,...")
    given.train()
    run = TrainingRun.open(tmp_path / "record")
    assert list(run.checkpoints) == [0, 1, 2, 3]
    losses = run.losses.to_pandas().set_index(["checkpoint", "example_id"])["loss"]
    for step, folder in run.checkpoints.items():
        model = load_model(folder).model
        expected = [slow_loss(model, row) for row in rows()]
        assert losses[step].tolist() == pytest.approx(expected, rel=1e-5)
    steps = run.steps.to_pandas()
    # The first step is taken from the weights of checkpoint 0, the second from those of checkpoint 1.
    for row in steps.itertuples():
        assert row.loss == pytest.approx(losses[row.step - 1, row.example_id], rel=1e-4)
    assert same_bits(load_model(run.checkpoints[3]).model, given.model.eval())


def test_checkpoints_have_what_attribution_asks_of_them(tmp_path):
    given = trainer(tmp_path / "out", steps=6, lr_scheduler_type="cosine")
    Recorder(given, tmp_path / "record", checkpoints="0,1,...")
    given.train()
    run = TrainingRun.open(tmp_path / "record")
    assert list(run.checkpoints) == [0, 3, 6]
    moments = read_adam(run.checkpoints[6], load_model(run.checkpoints[6]).model)
    state = given.optimizer.state[given.model.transformer.h[0].mlp.c_fc.weight]
    assert torch.equal(moments["transformer.h.0.mlp.c_fc.weight"].first, state["exp_avg"])
    rates = run.steps.to_pandas().groupby("step")["learning_rate"].first()
    from vestige.methods import learning_rates

    found = learning_rates([run.checkpoints[3], run.checkpoints[6]])
    assert found == pytest.approx([rates[:3].mean(), rates[3:].mean()])


@pytest.mark.slow
def test_attribution_reads_a_record(tmp_path):
    import vestige

    given = trainer(tmp_path / "out", "llama", steps=6)
    Recorder(given, tmp_path / "record", checkpoints="0,1,...")
    given.train()
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    for method in ("tracin", "less"):
        scores = vestige.attribute(
            checkpoints=str(tmp_path / "record"),
            data=str(path),
            queries=[{"id": "q", **rows()[2]} | {"id": "q"}],
            method=method,
            out=tmp_path / method,
            trust=False,
        )
        assert np.isfinite([row.score for row in scores.top(0, 5)]).all()


@pytest.mark.slow
def test_a_training_resumed_from_a_trainers_own_checkpoint_goes_on_in_the_record(tmp_path):
    alarm = Alarm(measure="loss", below=0.95, window=4)
    settings = {"save_strategy": "steps", "save_steps": 3}
    whole = trainer(tmp_path / "whole", "llama", **settings)
    Recorder(whole, tmp_path / "whole-record", checkpoints="0,0.5,...", alarm=alarm)
    whole.train()
    cut = trainer(tmp_path / "cut", "llama", **settings)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise KeyboardInterrupt

    Recorder(cut, tmp_path / "record", checkpoints="0,0.5,...", alarm=alarm)
    cut.add_callback(Stop)
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    again = trainer(tmp_path / "cut", "llama", **settings)
    Recorder(again, tmp_path / "record", checkpoints="0,0.5,...", alarm=alarm)
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
    found, expected = (TrainingRun.open(tmp_path / name) for name in ("record", "whole-record"))
    assert found.steps.equals(expected.steps)
    assert found.losses.equals(expected.losses)
    assert expected.at_risk is not None
    assert found.at_risk.equals(expected.at_risk)
    assert same_bits(load_model(found.checkpoints[6]).model, load_model(expected.checkpoints[6]).model)
    states = [(run.checkpoints[6] / "trainer_state.json").read_text() for run in (found, expected)]
    assert json.loads(states[0])["log_history"] == json.loads(states[1])["log_history"]


def test_the_last_optimizer_alone_may_be_kept(tmp_path):
    given = trainer(tmp_path / "out")
    Recorder(given, tmp_path / "record", keep_optimizer=False)
    given.train()
    has = {
        step: (path / "optimizer.pt").exists()
        for step, path in TrainingRun.open(tmp_path / "record").checkpoints.items()
    }
    assert has == {0: False, 3: False, 6: True}


@pytest.mark.slow
def test_another_training_in_the_same_folder_is_refused(tmp_path):
    first = trainer(tmp_path / "out", steps=2)
    Recorder(first, tmp_path / "record").release()
    assert "training_step" not in first.__dict__
    Recorder(first, tmp_path / "record")
    first.train()
    second = trainer(tmp_path / "out", steps=2)
    Recorder(second, tmp_path / "record")
    with pytest.raises(IndexMismatch, match="steps 1 to 2"):
        second.train()
    third = trainer(tmp_path / "out", steps=1)
    Recorder(third, tmp_path / "record", overwrite=True)
    third.train()
    assert list(TrainingRun.open(tmp_path / "record").checkpoints) == [0, 1]


@pytest.mark.slow
def test_what_cannot_be_recorded_is_refused(tmp_path):
    given = trainer(tmp_path / "out", steps=1, save_strategy="steps")
    with pytest.raises(UserError, match="own output folder"):
        Recorder(given, tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    recorder = Recorder(given, tmp_path / "full")
    with pytest.raises(UserError, match="recorded already"):
        Recorder(given, tmp_path / "other")
    with pytest.raises(IndexMismatch, match="holds other files"):
        given.train()
    recorder.release()
    with pytest.raises(UserError, match="ascending"):
        Recorder(given, tmp_path / "record", checkpoints="1,0")
    Recorder(given, tmp_path / "record", alarm=Alarm())
    with pytest.raises(DataError, match="share an answer"):
        given.train()


@pytest.mark.slow
def test_in_run_scores_and_a_record_go_together(tmp_path):
    from tests.online.workbench import validation
    from vestige.online import attach

    given = trainer(tmp_path / "out", steps=2)
    attached = attach(given, validation(2), out=tmp_path / "log")
    Recorder(given, tmp_path / "record")
    given.train()
    ids = TrainingRun.open(tmp_path / "record").steps["example_id"].to_pylist()
    assert attached.engine.log.table()["id"].to_pylist() == ids


class StopEarly(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2


def test_a_training_that_stops_early_is_saved_where_it_stopped(tmp_path):
    given = trainer(tmp_path / "out", "llama", steps=6)
    Recorder(given, tmp_path / "record")
    given.add_callback(StopEarly)
    given.train()
    run = TrainingRun.open(tmp_path / "record")
    assert list(run.checkpoints) == [0, 2]
    assert run.steps["step"].to_pylist()[-1] == 2
    assert same_bits(load_model(run.checkpoints[2]).model, given.model.eval())


def test_the_best_weights_are_not_taken_for_the_last_ones(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    given = trainer(tmp_path / "out", "llama", steps=6, held_out=rows()[:3], load_best_model_at_end=True, **settings)
    given.add_callback(StopEarly)
    Recorder(given, tmp_path / "record")
    given.train()
    assert list(TrainingRun.open(tmp_path / "record").checkpoints) == [0]
