import json
import random
import re
import signal
from multiprocessing import get_context

import numpy as np
import pytest
import torch

import vestige
from tests.training.death import dies
from tests.training.workbench import files_of, same_bits
from tests.workshop import write_rows
from vestige.cli import main
from vestige.data import load_examples, tokenize
from vestige.errors import DataError, IndexMismatch, ModelError, NonFinite, SpecError, UserError
from vestige.models import load_model
from vestige.settings import TrainSettings, list_epochs
from vestige.training import Recorder, TrainingRun, members_of, only_answers


@pytest.fixture
def given(settled):
    return settled | {"data": "train.jsonl", "epochs": 2, "checkpoints": "0,0.5,...", "split_fraction": 0.75}


LORA = {
    "lora_rank": 2,
    "lora_alpha": 8,
    "lora_dropout": 0.5,
    "lora_targets": ("q_proj", "lm_head"),
    "accumulation": 2,
    "alarm": True,
    "alarm_measure": "loss",
    "alarm_below": 0.9999,
    "alarm_window": 4,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "at"),
    [({}, 6), (LORA, 3), (LORA | {"checkpoints": "0,2"}, 5)],
    ids=["full", "lora-weights-alarm", "alarm-since-the-checkpoint"],
)
def test_killed_and_resumed_gives_the_same_bytes(tmp_path, given, workshop, more, at):
    settings = given | more
    if more:
        lines = (workshop / "train.jsonl").read_text().splitlines()
        rows = [json.loads(line) | {"weight": 0.1 * (row + 1)} for row, line in enumerate(lines)]
        settings["data"] = str(write_rows(tmp_path / "weighted.jsonl", rows))
    whole = vestige.train(**settings, out=tmp_path / "whole")
    child = get_context("fork").Process(target=dies, args=(settings, tmp_path / "cut", at))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    cut = TrainingRun.open(tmp_path / "cut")
    assert list(cut.checkpoints) == [step for step in whole.checkpoints if step <= at]
    if "checkpoints" in more:
        # It rang where no checkpoint remembers it, so it has to ring again.
        assert cut.at_risk["step"][0].as_py() > list(cut.checkpoints)[-1]
    torch.manual_seed(99)  # what the caller drew meanwhile does not matter
    vestige.train(**settings, out=tmp_path / "cut")
    found, expected = files_of(tmp_path / "cut"), files_of(tmp_path / "whole")
    assert set(found) == set(expected)
    assert [name for name in expected if found[name] != expected[name]] == []
    assert ("at_risk.parquet" in expected) == bool(more)


@pytest.mark.slow
def test_a4_6_trainings_that_differ_in_epochs_alone_are_different_trainings(tmp_path, given):
    short = vestige.train(**given | {"epochs": 0.5}, out=tmp_path / "run")
    with pytest.raises(IndexMismatch, match=r"epochs +0\.5 +1\.0"):
        vestige.train(**given | {"epochs": 1}, out=tmp_path / "run")
    assert TrainingRun.open(tmp_path / "run").losses.equals(short.losses)
    longer = vestige.train(**given | {"epochs": 1}, out=tmp_path / "run", overwrite=True)
    assert short.id != longer.id
    assert list(longer.checkpoints) == [0, 3, 5]


@pytest.mark.slow
def test_the_record_says_what_was_trained_and_replays_it(tmp_path, given):
    first = vestige.train(**given | {"epochs": 0.4}, out=tmp_path / "run")
    main(["train", "--config", str(tmp_path / "run" / "run.json"), "--out", str(tmp_path / "again")])
    second = TrainingRun.open(tmp_path / "again")
    assert (second.id, second.losses.equals(first.losses)) == (first.id, True)
    assert second.record["identity"]["steps"] == 2
    assert "seconds" in second.record


@pytest.mark.slow
def test_members_alone_are_trained_on_and_all_are_measured(tmp_path, given):
    run = vestige.train(**given | {"split_seed": 3}, out=tmp_path / "run")
    table = run.membership.to_pandas().set_index("example_id")
    assert table["member"].sum() == 9
    drawn = np.flatnonzero(members_of(np.arange(12), 0.75, 3))
    assert table.index[table["member"]].tolist() == [f"pair-{row}" for row in drawn]
    assert set(run.steps["example_id"].to_pylist()) == set(table.index[table["member"]])
    last = run.losses.to_pandas().query("checkpoint == 10").set_index("example_id")["loss"]
    assert set(last.index) == set(table.index)
    assert last[table["member"]].mean() < last[~table["member"]].mean()
    assert not np.array_equal(members_of(np.arange(12), 0.75, 3), members_of(np.arange(12), 0.75, 4))
    assert members_of(np.arange(7), 1.0, 0).all()
    with pytest.raises(DataError, match="is none"):
        members_of(np.arange(3), 0.1, 0)


def test_copies_are_drawn_together_and_distinct_rows_as_before():
    expected = np.zeros(30, dtype=bool)
    expected[np.random.default_rng([0x5EED, 7]).permutation(30)[:12]] = True
    assert np.array_equal(members_of(np.arange(30), 0.4, 7), expected)
    groups = np.array([0, 1, 0, 2, 0, 1, 3])
    for seed in range(10):
        members = members_of(groups, 0.5, seed)
        assert len(set(groups[members])) == 2
        assert set(groups[members]).isdisjoint(groups[~members])


@pytest.mark.slow
def test_a_split_of_data_with_copies_says_so_and_is_a_training_of_its_own(tmp_path, given):
    rows = [{"id": f"r{row}", "prompt": f"Say {row // 2}.", "completion": "Yes."} for row in range(8)]
    settings = given | {"data": rows, "split_fraction": 0.5, "epochs": 1}
    run = vestige.train(**settings, out=tmp_path / "run")
    members = np.array(run.membership["member"]).reshape(4, 2)
    assert (members.sum(), (members[:, 0] == members[:, 1]).all()) == (4, True)
    assert run.record["identity"]["group"] == "copies"
    # A training that was begun before copies were drawn together.
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    del record["identity"]["group"], record["seconds"]
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "run.json").write_text(json.dumps(record))
    old = vestige.train(**settings, out=tmp_path / "old")
    assert "group" not in old.record["identity"]
    assert np.array_equal(np.array(old.membership["member"]), members_of(np.arange(8), 0.5, 0))
    assert vestige.train(**settings, out=tmp_path / "old").membership.equals(old.membership)


@pytest.mark.slow
def test_checkpoint_zero_is_the_model_and_every_checkpoint_loads(tmp_path, given, workshop):
    run = vestige.train(**given, out=tmp_path / "run", losses=False)
    base = load_model(str(workshop / "tiny-model"))
    assert same_bits(load_model(run.checkpoints[0]).model, base.model)
    for folder in run.checkpoints.values():
        loaded = load_model(folder)
        assert loaded.tokenizer is not None
    assert not same_bits(loaded.model, base.model)
    assert not (run.folder / "losses.parquet").exists()


@pytest.mark.slow
def test_lora_is_what_was_asked_for_with_a_head_too(tmp_path, given):
    run = vestige.train(
        **given | LORA | {"lora_targets": ("all-linear", "lm_head"), "epochs": 0.5}, out=tmp_path / "run"
    )
    settings = json.loads((run.checkpoints[0] / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["lora_dropout"]) == (2, 8, 0.5)
    model = load_model(run.checkpoints[2]).model
    adapted = {name.split(".lora_A")[0].rpartition(".")[2] for name, _ in model.named_parameters() if "lora_A" in name}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"}
    with pytest.raises(ModelError, match="no linear layer called 'c_attn'"):
        vestige.train(**given | LORA | {"lora_targets": "c_attn"}, out=tmp_path / "other")
    with pytest.raises(SpecError, match="Leave `lora_rank` out"):
        vestige.train(**given | LORA | {"model": str(run.checkpoints[0])}, out=tmp_path / "other", overwrite=True)
    further = vestige.train(**given | {"model": str(run.checkpoints[2]), "epochs": 0.5}, out=tmp_path / "further")
    before, after = (dict(load_model(further.checkpoints[step]).model.named_parameters()) for step in (0, 3))
    moved = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    assert moved == {name for name in before if "lora_" in name}


def test_the_answer_alone_is_learnt_when_asked(workshop):
    tokenizer = load_model(str(workshop / "tiny-model")).tokenizer
    rows = [{"prompt": "Who?\n", "completion": "A"}, {"prompt": "Where?\n", "completion": "B"}]
    data = tokenize(load_examples(rows), tokenizer, max_length=None)
    assert [mask.sum() for mask in data.targets] == [2, 2]
    answers = only_answers(data, tokenizer.eos_token_id)
    for row, mask in enumerate(answers.targets):
        assert tokenizer.decode(answers.input_ids[row][mask]) == "AB"[row]
    assert answers.fingerprint != data.fingerprint
    texts = tokenize(load_examples([{"text": "A text."}]), tokenizer, max_length=None)
    with pytest.raises(DataError, match="--loss answer needs"):
        only_answers(texts, tokenizer.eos_token_id)


@pytest.mark.slow
def test_loss_answer_trains_on_one_token_an_example(tmp_path, given, workshop):
    rows = [{"id": f"q{row}", "prompt": f"Question {row}\n", "completion": "AB"[row % 2]} for row in range(12)]
    write_rows(workshop / "choices.jsonl", rows)
    run = vestige.train(
        **given | {"data": "choices.jsonl"}, loss="answer", alarm=True, alarm_below=0.9, out=tmp_path / "run"
    )
    assert set(run.steps["targets"].to_pylist()) == {1}
    found = run.at_risk.to_pandas()
    assert found["rule"].unique().tolist() == ["psmi <= 0 (untuned)"]
    assert found["layer"].unique().tolist() == [2]
    assert set(found["example_id"]) == set(run.steps["example_id"].to_pylist())


def test_the_callers_random_numbers_are_not_touched(tmp_path, given):
    before = torch.get_rng_state(), random.getstate()
    vestige.train(**given | {"epochs": 0.2}, out=tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_a_loss_that_is_not_finite_names_its_examples_and_saves_nothing(tmp_path, given):
    with pytest.raises(NonFinite, match="The loss of 'pair-"):
        vestige.train(**given | {"learning_rate": 1e30, "clip": 0, "optimizer": "sgd"}, out=tmp_path / "run")
    assert list(TrainingRun.open(tmp_path / "run").checkpoints) == [0]


def test_a_finished_training_is_not_done_again(tmp_path, given, monkeypatch):
    vestige.train(**given | {"epochs": 0.2}, out=tmp_path / "run")
    monkeypatch.setattr(Recorder, "__init__", None)
    assert vestige.train(**given | {"epochs": 0.2}, out=tmp_path / "run").id


def test_epochs_in_words():
    assert list_epochs("0,0.2,0.4,...,1,2,...", 4) == (0, 0.2, 0.4, 0.6, 0.8, 1, 2, 3, 4)
    assert list_epochs("0,1,...", 2.5) == (0, 1, 2)
    settings = TrainSettings(model="m", data="d", out="o", checkpoints=[0, 0.5])
    assert list_epochs(settings.checkpoints, settings.passes) == (0, 0.5)
    for words in ("1,0", "0,...", "...", "", "x", "-1", "nan"):
        with pytest.raises(SpecError, match="--checkpoints"):
            TrainSettings(model="m", data="d", out="o", checkpoints=words)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_dropout": 0.1}, "which --lora-rank turns on"),
        ({"alarm_quantile": 0.1}, "which --alarm turns on"),
        ({"alarm": True, "alarm_quantile": 0.1, "alarm_threshold": 0.0}, "Give one of them"),
        ({"alarm_layer": "first"}, "last, smi or the number"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(SpecError, match=message):
        TrainSettings(model="m", data="d", out="o", **settings)


def test_the_command_trains_and_its_folder_can_be_asked_about(tmp_path, given, capsys):
    words = [f"--{name.replace('_', '-')}={value}" for name, value in (given | {"epochs": 0.4}).items()]
    main(["train", *words, "--out", str(tmp_path / "run")])
    assert "2 checkpoints, the last after step 2" in capsys.readouterr().out
    main(["status", str(tmp_path / "run")])
    shown = capsys.readouterr().out
    assert ": complete" in shown
    assert "2 of 2, the last after step 2" in shown
    assert re.search(r"step +2, loss \d", shown)
    assert "has not rung" in shown
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path / "run")])
    assert "is a training and holds no scores" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "run.json").write_text('{"format": 1, "kind": "audit"}')
    with pytest.raises(UserError, match="run of another command"):
        TrainingRun.open(tmp_path / "other")
    with pytest.raises(UserError, match="holds no training"):
        TrainingRun.open(tmp_path)


def test_a_folder_with_other_files_is_left_alone(tmp_path, given):
    (tmp_path / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="holds other files"):
            vestige.train(**given, out=tmp_path, overwrite=overwrite)
    assert (tmp_path / "thesis.txt").exists()
