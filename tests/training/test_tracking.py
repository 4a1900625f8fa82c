"""Reports to trackers: real event files, wandb without a network, trackio, and what a failing tracker may not do."""

import importlib.util
import json
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

import vestige
from tests.training.death import dies
from tests.training.workbench import files_of
from vestige.cli import main
from vestige.errors import MissingExtra, SpecError
from vestige.evaluate import Estimate, Evaluation, EvaluationRow, write_evaluation
from vestige.training import TRACKERS, Tracker, TrainingRun


class Kept(Tracker):
    """Keeps what is reported in this process; fails from the step that a test sets on."""

    package = "json"
    runs: list = []  # noqa: RUF012
    fails_from = None

    def __init__(self, run):
        self.run, self.logged, self.finished = run, [], False
        self.runs.append(self)

    def log(self, values, step):
        if self.fails_from is not None and step >= self.fails_from:
            raise ConnectionError("no network\nand more")
        self.logged.append((step, dict(values)))

    def finish(self):
        self.finished = True


TRACKERS.add("kept", Kept)


@pytest.fixture
def kept(monkeypatch):
    monkeypatch.setattr(Kept, "runs", [])
    return Kept


@pytest.fixture
def given(settled):
    return settled | {"data": "train.jsonl", "epochs": 1, "checkpoints": "0,0.5,1", "warmup": 2}


def steps_of(run):
    """Loss and rate of each step by the training's own log: the mean over its target tokens."""
    table = run.steps.to_pandas()
    table["total"] = table.loss * table.targets
    sums = table.groupby("step")[["total", "targets"]].sum()
    return (sums.total / sums.targets).tolist(), table.groupby("step")["learning_rate"].first().tolist()


def test_a_tracker_is_given_every_step_and_every_checkpoint(tmp_path, given, kept):
    run = vestige.train(**given, out=tmp_path / "run", report_to="kept")
    (tracker,) = kept.runs
    losses, rates = steps_of(run)
    steps = [(step, values) for step, values in tracker.logged if "train/loss" in values]
    assert [step for step, _ in steps] == list(range(1, 7))
    np.testing.assert_allclose([values["train/loss"] for _, values in steps], losses, rtol=1e-5)
    assert [values["train/learning_rate"] for _, values in steps] == rates
    assert all(values["train/steps_per_second"] > 0 for _, values in steps)
    measured = run.losses.to_pandas().groupby("checkpoint")["loss"].mean()
    data = {step: values["train/data_loss"] for step, values in tracker.logged if "train/data_loss" in values}
    assert data == pytest.approx(measured.to_dict())
    assert tracker.finished
    assert (tracker.run.name, tracker.run.group) == ("run", None)
    assert tracker.run.config["learning_rate"] == 1e-2
    assert tracker.run.config["steps"] == 6


@pytest.mark.slow
def test_validation_losses_are_reported_and_nothing_of_the_training_changes(tmp_path, given, kept):
    plain = vestige.train(**given, out=tmp_path / "plain", validation="train.jsonl")
    vestige.train(**given, out=tmp_path / "run", validation="train.jsonl", report_to="kept")
    losses = [values["train/validation_loss"] for _, values in kept.runs[0].logged if "train/validation_loss" in values]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    found, expected = files_of(tmp_path / "run"), files_of(tmp_path / "plain")
    assert {name: content for name, content in found.items() if not name.startswith("tracking/")} == expected
    assert TrainingRun.open(tmp_path / "run").id == plain.id


def test_a_tracker_that_fails_loses_no_training(tmp_path, given, kept, monkeypatch, capsys):
    monkeypatch.setattr(kept, "fails_from", 3)
    run = vestige.train(**given, out=tmp_path / "run", report_to="kept")
    assert list(run.checkpoints) == [0, 3, 6]
    assert [step for step, _ in kept.runs[0].logged] == [0, 1, 2]
    said = capsys.readouterr().err
    assert said.count("kept failed (no network): nothing more is reported there. The work goes on.") == 1


@pytest.mark.slow
def test_a_resumed_training_is_the_same_run_and_another_one_is_not(tmp_path, given, kept):
    child = get_context("fork").Process(target=dies, args=(given | {"report_to": "kept"}, tmp_path / "cut", 4))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    begun = (tmp_path / "cut/tracking/id").read_text()
    vestige.train(**given, out=tmp_path / "cut", report_to="kept")
    (tracker,) = kept.runs
    assert (tracker.run.id, tracker.run.step) == (begun, 3)
    assert [step for step, values in tracker.logged if "train/loss" in values] == [4, 5, 6]
    vestige.train(**given, out=tmp_path / "other", report_to="kept")
    vestige.train(**given, out=tmp_path / "cut", report_to="kept", overwrite=True)
    assert len({each.run.id for each in kept.runs}) == 3


def test_a_package_that_is_not_there_is_named_before_anything_is_done(tmp_path, given, kept, monkeypatch, capsys):
    monkeypatch.setattr(kept, "package", "not_installed_here")
    with pytest.raises(MissingExtra, match="pip install not_installed_here"):
        vestige.train(**given, out=tmp_path / "run", report_to="kept")
    words = ["train", "--model", "tiny-model", "--data", "train.jsonl", "--out", str(tmp_path / "other")]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--report-to", "kept"])
    assert ended.value.code == 2
    assert "pip install 'vestige[tracking]'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*words, "--report-to", "wandbb"])
    assert "Did you mean 'wandb'?" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
    with pytest.raises(SpecError):
        vestige.train(**given, out=tmp_path / "run", report_to="nothing")


@pytest.mark.slow
def test_each_model_of_a_bank_is_a_run_of_one_group(tmp_path, given, kept):
    settings = {name: given[name] for name in ("model", "data", "batch_size", "learning_rate")}
    vestige.bank(**settings, out=tmp_path / "bank", subsets=2, seeds=1, steps=2, report_to="kept")
    assert [each.run.group for each in kept.runs] == ["bank", "bank"]
    assert len({each.run.id for each in kept.runs}) == len({each.run.name for each in kept.runs}) == 2
    assert all([step for step, _ in each.logged] == [1, 2] for each in kept.runs)
    vestige.bank(**settings, out=tmp_path / "bank", subsets=3, seeds=1, steps=2, report_to="kept")
    assert len(kept.runs) == 3, "members that are there are not trained again"
    vestige.bank(**settings, out=tmp_path / "bank", subsets=2, seeds=1, steps=2, overwrite=True)
    assert not (tmp_path / "bank/tracking").exists()


def test_the_numbers_of_an_evaluation_are_reported(tmp_path, kept):
    row = EvaluationRow("influence", {"LDS": Estimate(0.5, 0.4, 0.6), "queries": 3, "note": "text", "none": None})
    nothing = EvaluationRow("random", {"LDS": Estimate(float("nan"), float("nan"), float("nan"))})
    write_evaluation(Evaluation("lds", "Title", (row, nothing)), tmp_path / "lds", {}, ["kept"])
    (tracker,) = kept.runs
    at = "lds/influence"
    assert tracker.logged == [
        (0, {f"{at}/LDS/value": 0.5, f"{at}/LDS/low": 0.4, f"{at}/LDS/high": 0.6, f"{at}/queries": 3})
    ]
    assert tracker.run.config["evaluation"] == "lds"


def test_the_numbers_of_indexes_that_are_compared_without_the_model_are_reported(tmp_path, settled, kept):
    for size in (8, 16):
        given = {"model": settled["model"], "data": "train.jsonl", "compress": f"tensorsketch:{size}"}
        vestige.index(**given, out=tmp_path / f"{size}")
    folders = [str(tmp_path / "8"), str(tmp_path / "16")]
    report = vestige.evaluate.sketch(index=folders, num_ref=4, out=tmp_path / "sketch", report_to="kept")
    (tracker,) = kept.runs
    ((family, (point,)),) = report.curves.items()
    assert tracker.logged[0][1][f"sketch/{family}/8/rmse"] == point.rmse


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    read.Reload()
    return {name: [(each.step, each.value) for each in read.Scalars(name)] for name in read.Tags()["scalars"]}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_reads_the_event_files_of_a_training_that_was_killed(tmp_path, given):
    settings = given | {"report_to": ("tensorboard",)}
    child = get_context("fork").Process(target=dies, args=(settings, tmp_path / "run", 4))
    child.start()
    child.join()
    run = vestige.train(**settings, out=tmp_path / "run")
    losses, rates = steps_of(run)
    found = scalars(tmp_path / "run/tracking")
    assert [step for step, _ in found["train/loss"]] == list(range(1, 7)), "steps taken again are there once"
    np.testing.assert_allclose([value for _, value in found["train/loss"]], losses, rtol=1e-5)
    np.testing.assert_allclose([value for _, value in found["train/learning_rate"]], rates, rtol=1e-5)
    assert [step for step, _ in found["train/data_loss"]] == [0, 3, 6]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_workers_report_each_member_to_a_folder_of_its_own(tmp_path, given):
    settings = {name: given[name] for name in ("model", "data", "batch_size", "learning_rate")}
    more = {"out": tmp_path / "bank", "subsets": 2, "seeds": 2, "steps": 2, "workers": 2}
    vestige.bank(**settings, **more, report_to="tensorboard")
    members = sorted(path for path in (tmp_path / "bank/tracking").iterdir() if path.is_dir())
    assert len(members) == 4
    assert all([step for step, _ in scalars(each)["train/loss"]] == [1, 2] for each in members)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_keeps_a_run_without_a_network(tmp_path, given, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    vestige.train(**given, out=tmp_path / "run", report_to=("wandb",))
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    identity = (tmp_path / "run/tracking/id").read_text()
    assert folder.name.endswith(identity)
    (stored,) = folder.glob(f"run-{identity}.wandb")
    assert stored.stat().st_size > 1000
    assert b"learning_rate" in stored.read_bytes()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(importlib.util.find_spec("trackio") is None, reason="trackio is not installed")
def test_trackio_keeps_the_steps_on_this_machine(tmp_path, given, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    script = "import json, sys, vestige; vestige.train(**json.loads(sys.argv[1]))"
    settings = given | {"out": str(tmp_path / "run"), "report_to": ["trackio"]}
    done = subprocess.run([sys.executable, "-c", script, json.dumps(settings)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "trackio failed" not in done.stderr
    with closing(sqlite3.connect(tmp_path / "trackio/vestige.db")) as stored:
        rows = stored.execute("SELECT run_name, step, metrics FROM metrics ORDER BY step").fetchall()
    identity = (tmp_path / "run/tracking/id").read_text()
    assert {name for name, _, _ in rows} == {f"run-{identity}"}
    assert [step for _, step, values in rows if b"train/loss" in values] == list(range(1, 7))
