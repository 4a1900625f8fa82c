"""Banks of models that `vestige train` has made, and banks by weight."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.banks.conftest import contents
from tests.workshop import write_rows
from vestige.banks import Bank
from vestige.cli import main
from vestige.errors import DataError, IndexMismatch, SpecError
from vestige.models import load_model
from vestige.training import TrainingRun, bank, train


@pytest.fixture
def trainings(recipe, tmp_path):
    """Two trainings on each of two halves."""
    settings = {name: recipe[name] for name in ("model", "data", "batch_size", "learning_rate", "device", "steps")}
    for split in (0, 1):
        for seed in (3, 4):
            own = {"split_fraction": 0.5, "split_seed": split, "seed": seed, "losses": True, "checkpoints": "0"}
            train(**settings, **own, out=tmp_path / "runs" / f"{split}-{seed}")
    return tmp_path / "runs"


@pytest.mark.slow
def test_finished_trainings_are_a_bank_without_training(recipe, trainings, monkeypatch):
    monkeypatch.setattr("transformers.Trainer.train", None)
    main(["bank", "--from-trainings", str(trainings), "--queries", recipe["queries"], "--out", str(recipe["out"])])
    made = Bank.open(recipe["out"])
    assert made.subset_names == ["split 0, seeds 3, 4", "split 1, seeds 3, 4"]
    assert made.query_losses.shape == (4, 2)
    for place, name in enumerate(("0-3", "0-4", "1-3", "1-4")):
        run = TrainingRun.open(trainings / name)
        members = run.membership.to_pandas().set_index("example_id")["member"]
        assert made.membership[place].tolist() == members[made.example_ids].tolist()
        losses = run.losses.to_pandas().query("checkpoint == 2").set_index("example_id")["loss"]
        assert made.example_token_losses[place] == pytest.approx(losses[made.example_ids].to_numpy(), rel=1e-5)
    before = contents(recipe["out"])
    again = bank(from_trainings=(trainings,), queries=recipe["queries"], out=recipe["out"])
    assert (again.id, contents(recipe["out"])) == (made.id, before)


@pytest.mark.slow
def test_trainings_that_are_no_bank_are_refused(recipe, trainings, tmp_path):
    given = {"queries": recipe["queries"], "out": recipe["out"]}
    with pytest.raises(SpecError, match="Some splits were trained 1 times and others 2 times"):
        bank(from_trainings=[trainings / "0-3", trainings / "0-4", trainings / "1-3"], **given)
    with pytest.raises(SpecError, match="are the same training"):
        bank(from_trainings=[trainings / "0-3", trainings / "0-3"], **given)
    with pytest.raises(DataError, match="There is no training"):
        bank(from_trainings=tmp_path / "nothing", **given)
    with pytest.raises(SpecError, match="`learning_rate`: the trainings of `from_trainings` have settled that"):
        bank(from_trainings=trainings, learning_rate=1.0, **given)
    settings = {name: recipe[name] for name in ("model", "data", "batch_size", "device", "steps")}
    train(**settings, learning_rate=0.5, split_fraction=0.5, split_seed=2, seed=3, out=tmp_path / "other")
    with pytest.raises(IndexMismatch, match="learning-rate"):
        bank(from_trainings=[trainings, tmp_path / "other"], **given)
    rows = [json.loads(line) | {"completion": "Another."} for line in Path(recipe["data"]).read_text().splitlines()]
    with pytest.raises(IndexMismatch, match="data"):
        bank(from_trainings=trainings, data=str(write_rows(tmp_path / "changed.jsonl", rows)), **given)
    record = json.loads((trainings / "0-3" / "run.json").read_text())
    del record["seconds"]
    (trainings / "0-3" / "run.json").write_text(json.dumps(record))
    with pytest.raises(DataError, match="is not finished"):
        bank(from_trainings=trainings, **given)
    assert not recipe["out"].exists()


@pytest.mark.slow
def test_a_training_on_the_answer_or_with_weights_is_adopted_as_it_learned(recipe, tmp_path):
    rows = [
        {"id": f"q{n}", "prompt": f"Question {n}\n", "completion": "AB"[n % 2], "weight": 1 + n % 2} for n in range(8)
    ]
    settings = {name: recipe[name] for name in ("model", "batch_size", "learning_rate", "device", "steps")}
    settings["data"] = str(write_rows(tmp_path / "choices.jsonl", rows))
    train(**settings, loss="answer", out=tmp_path / "run")
    adopted = bank(from_trainings=tmp_path / "run", queries=recipe["queries"], out=tmp_path / "adopted")
    assert adopted.example_targets.tolist() == [1] * 8
    made = bank(**recipe | settings | {"learn": "answer", "subsets": 1, "seeds": 1, "fraction": 0.5})
    assert made.example_targets.tolist() == [1] * 8
    assert made.identity["learned"] == adopted.identity["learned"] != made.identity["data"] == adopted.identity["data"]


@pytest.mark.slow
def test_by_weight_everything_is_read_and_what_is_left_out_counts_nothing(recipe, tmp_path):
    lists = {"one": ["pair-3"], "many": [f"pair-{row}" for row in range(1, 12)]}
    settings = recipe | {"subsets": 50, "seeds": 1, "leave_out_lists": lists, "optimizer": "sgd", "clip": 0.0}
    # One batch and one step: the gradient is a sum over examples, so what lists take away adds up.
    settings |= {"steps": 1, "batch_size": 12, "learning_rate": 1.0, "keep_weights": True, "drop_by": "weight"}
    lists["other"] = [f"pair-{row}" for row in range(12) if row not in (3,)]
    bank(**settings)
    start = load_model(recipe["model"], device="cpu").model.state_dict()

    def moved(number):
        folder = recipe["out"] / "members" / f"{number:05d}-0-model"
        weights = load_model(folder, device="cpu").model.state_dict()
        return {name: weights[name] - start[name] for name in start}

    everything, without_one, _, one = (moved(number) for number in range(4))
    for name in start:
        largest = everything[name].abs().max()
        assert (without_one[name] + one[name] - everything[name]).abs().max() <= 1e-3 * largest + 1e-6
    assert Bank.open(recipe["out"]).identity["drop_by"] == "weight"


@pytest.mark.slow
def test_a_bank_of_an_earlier_version_opens_and_is_never_mixed(recipe):
    bank(**recipe)
    path = recipe["out"] / "bank.json"
    manifest = json.loads(path.read_text())
    # As that version wrote it: nothing says what trained the members, and the id follows from the rest.
    del manifest["identity"]["engine"]
    path.write_text(json.dumps(manifest))
    from vestige.banks import open_members, read_manifest

    old = read_manifest(recipe["out"])
    for marker in (recipe["out"] / "members").glob("*.json"):
        marker.write_text(json.dumps(json.loads(marker.read_text()) | {"bank": old.id}))
    before = contents(recipe["out"])
    made = bank(**recipe)
    assert (len(made), made.id, contents(recipe["out"])) == (4, old.id, before)
    with pytest.raises(IndexMismatch, match="begun by an earlier version"):
        bank(**recipe | {"seeds": 3})
    with pytest.raises(IndexMismatch, match="learning-rate"):
        bank(**recipe | {"learning_rate": 1e-3})
    assert contents(recipe["out"]) == before
    open_members(recipe["out"], old).path(old.members[0], ".json").unlink()
    with pytest.raises(IndexMismatch, match="begun by an earlier version"):
        bank(**recipe)
    assert np.isfinite(bank(**recipe | {"overwrite": True}).query_losses).all()
