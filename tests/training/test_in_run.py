"""`vestige train` from scratch, for a number of steps, and scored in the run by validation examples."""

import json
import signal
from multiprocessing import get_context

import numpy as np
import pytest
import torch

import vestige
from tests.training.death import dies
from tests.training.workbench import files_of
from vestige.cli import main
from vestige.data import load_examples, tokenize
from vestige.errors import DataError, SpecError
from vestige.models import load_model
from vestige.online import OnlineLog
from vestige.runs import Scores
from vestige.training import TrainingRun

QUERY = [{"id": "sky", "prompt": "Tell me why the sky looks blue.", "completion": "Air scatters blue light."}]


@pytest.fixture
def given(settled):
    return settled | {"data": "train.jsonl", "steps": 4, "checkpoints": "0,0.5,..."}


def weights_of(run: TrainingRun) -> dict[str, torch.Tensor]:
    return load_model(list(run.checkpoints.values())[-1]).model.state_dict()


@pytest.mark.slow
def test_steps_say_how_long_and_checkpoints_stay_in_epochs(tmp_path, given):
    run = vestige.train(**given, out=tmp_path / "run")
    assert (run.record["identity"]["steps"], "epochs" in run.record["identity"]) == (4, False)
    # Six steps a pass: half a pass is three.
    assert list(run.checkpoints) == [0, 3, 4]
    same = vestige.train(**given | {"steps": None, "epochs": 4 / 6}, out=tmp_path / "epochs")
    assert all(torch.equal(weight, weights_of(same)[name]) for name, weight in weights_of(run).items())
    with pytest.raises(SpecError, match="`epochs` and `steps` both"):
        vestige.train(**given, epochs=1, out=tmp_path / "both")


@pytest.mark.slow
def test_from_scratch_begins_with_weights_of_the_seed(tmp_path, given):
    runs = [vestige.train(**given, from_scratch=True, seed=seed, out=tmp_path / str(seed)) for seed in (5, 6)]
    base = load_model("tiny-model").model.state_dict()
    starts = [load_model(run.checkpoints[0]).model.state_dict() for run in runs]
    name = "model.embed_tokens.weight"
    assert not torch.equal(starts[0][name], base[name])
    assert not torch.equal(starts[0][name], starts[1][name])
    with pytest.raises(SpecError, match="there are none"):
        vestige.train(**given, from_scratch=True, lora_rank=2, out=tmp_path / "lora")


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"lora_rank": 2, "lora_dropout": 0.5, "accumulation": 2}], ids=["full", "lora"])
def test_validation_leaves_a_run_and_the_training_as_it_is(tmp_path, given, more):
    plain = vestige.train(**given | more, out=tmp_path / "plain")
    run = vestige.train(**given | more, validation=QUERY, out=tmp_path / "run")
    assert all(torch.equal(weight, weights_of(run)[name]) for name, weight in weights_of(plain).items())
    scores = Scores.open(run.folder / "in-run")
    assert (scores.run.method, scores.queries) == ("in-run", ["validation"])
    assert scores.dense().shape == (1, 12)
    log = OnlineLog.open(run.folder / "in-run-log")
    steps = run.steps.to_pandas()
    assert log.table()["id"].to_pylist() == steps["example_id"].tolist()
    assert set(log.influence()) == set(steps["example_id"])
    results = json.loads((run.folder / "results.json").read_text())
    assert [one["step"] for one in results] == [1, 2, 3, 4]
    first = log.table().to_pylist()[0]
    assert results[0]["eval_loss"] == first["validation_loss"]
    assert results[0]["test_loss"] is None
    assert set(results[0]) == {"step", "train_loss", "eval_loss", "test_loss"}
    assert all(one["train_loss"] > 0 for one in results)
    assert "scores of its steps in in-run" in repr(run)
    assert plain.id != run.id


@pytest.mark.slow
def test_the_scores_add_up_to_the_fall_of_the_validation_loss(tmp_path, given):
    settings = given | {"optimizer": "sgd", "clip": 0, "learning_rate": 1e-2, "schedule": "constant", "steps": 6}
    run = vestige.train(**settings, validation=QUERY, out=tmp_path / "run")
    losses = []
    for folder in (run.checkpoints[0], run.checkpoints[6]):
        loaded = load_model(folder)
        data = tokenize(load_examples(QUERY), loaded.tokenizer, max_length=None)
        ids = torch.tensor(np.asarray(data.input_ids[0], dtype=np.int64))[None]
        labels = torch.where(torch.tensor(data.targets[0])[None], ids, -100)
        with torch.no_grad():
            losses.append(float(loaded.model(input_ids=ids, labels=labels).loss))
    total = Scores.open(run.folder / "in-run").dense().sum()
    assert total == pytest.approx(losses[0] - losses[1], rel=0.1)


@pytest.mark.slow
def test_select_trains_on_the_best_of_each_batch(tmp_path, given):
    settings = given | {"batch_size": 4, "validation": QUERY, "select": 1}
    run = vestige.train(**settings, out=tmp_path / "run")
    steps = run.steps.to_pandas()
    assert steps.groupby("step").size().tolist() == [1, 1, 1, 1]
    assert OnlineLog.open(run.folder / "in-run-log").table()["id"].to_pylist() == steps["example_id"].tolist()
    with pytest.raises(SpecError, match="which examples a step learned from"):
        vestige.attribute(method="replay", training=run.folder, queries=QUERY, out=tmp_path / "replayed")
    for wrong in ({"validation": None}, {"accumulation": 2}):
        with pytest.raises(SpecError, match="chooses from each batch"):
            vestige.train(**settings | wrong, out=tmp_path / "wrong")


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 3])
def test_killed_and_resumed_gives_the_same_scores(tmp_path, given, at):
    settings = given | {"validation": QUERY}
    whole = vestige.train(**settings, out=tmp_path / "whole")
    child = get_context("fork").Process(target=dies, args=(settings, tmp_path / "cut", at))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    cut = vestige.train(**settings, out=tmp_path / "cut")
    found, expected = (OnlineLog.open(run.folder / "in-run-log").table() for run in (cut, whole))
    assert found.equals(expected)
    ours, theirs = (Scores.open(run.folder / "in-run").dense() for run in (cut, whole))
    np.testing.assert_array_equal(ours, theirs)
    # The type checker of the tests draws from Python's random numbers, which a checkpoint holds beside the others.
    states = [name for name in files_of(whole.folder) if name.endswith("rng_state.pth")]
    for name in states:
        one, other = (torch.load(run.folder / name, weights_only=False) for run in (cut, whole))
        assert repr(one["numpy"]) == repr(other["numpy"])
        assert torch.equal(one["cpu"], other["cpu"])
    names = [name for name in files_of(whole.folder) if not name.startswith("in-run") and name not in states]
    assert {name: files_of(cut.folder)[name] for name in names} == {
        name: files_of(whole.folder)[name] for name in names
    }


@pytest.mark.slow
def test_the_command_scores_in_the_run_and_a_changed_validation_is_refused(tmp_path, given, workshop, capsys):
    (workshop / "held-out.jsonl").write_text('{"id": "sky", "text": "The sky is blue."}\n')
    words = ["train", "--model", "tiny-model", "--data", "train.jsonl", "--steps", "2", "--out", str(tmp_path / "run")]
    main([*words, "--validation", "held-out.jsonl"])
    assert "scores of its steps in in-run" in capsys.readouterr().out
    (workshop / "held-out.jsonl").write_text('{"id": "sky", "text": "The sky is green."}\n')
    with pytest.raises(SystemExit):
        main([*words, "--validation", "held-out.jsonl"])
    assert "validation" in capsys.readouterr().err
    main([*words, "--validation", "held-out.jsonl", "--overwrite"])
    assert (tmp_path / "run" / "in-run" / "run.json").is_file()


def test_a_validation_without_a_token_to_predict_is_refused(tmp_path, given):
    (tmp_path / "held-out.jsonl").write_text('{"id": "why", "prompt": "Why?"}\n')
    with pytest.raises(DataError, match="Query 'why' has no token whose loss could be measured"):
        vestige.train(**given, validation=tmp_path / "held-out.jsonl", out=tmp_path / "run")
