"""kill -9 at chosen moments of a sweep, and jobs inside of jobs: the outputs do not tell."""

import os
import signal
from multiprocessing import get_context
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
import torch.distributed
from tests.workshop import furnish

from sweep.conftest import lexical, results
from vestige.distributed import ROLE_VARIABLE
from vestige.errors import SpecError, WorkElsewhere
from vestige.jobs import Role
from vestige.training import Recorder, TrainingRun
from vestige_recipes.sweep import run as run_module, sweep, sweep_report


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return furnish(tmp_path_factory.mktemp("workshop"))


@pytest.fixture
def trainings(workshop, monkeypatch):
    monkeypatch.setenv("VESTIGE_QUIET", "1")
    base = {"model": str(workshop / "tiny-model"), "data": str(workshop / "train.jsonl"), "device": "cpu"}
    base |= {"split_fraction": 0.5, "epochs": 2, "checkpoints": "0,1,2", "batch_size": 2, "learning_rate": 1e-2}
    return {"verb": "train", "base": base, "axes": {"split_seed": [0, 1, 2]}}


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def dies(prepare, *arguments):
    """A process that was prepared to kill itself, and has."""
    child = get_context("fork").Process(target=prepare, args=arguments)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL


def sweep_until_marker(content, out, cells, whole):
    """Dies when so many cells are done: of the next one before its marker is written, or after it, at once."""
    honest, said = run_module.write_done, []

    def write_done(cell, *rest):
        if whole or len(said) < cells:
            honest(cell, *rest)
        said.append(cell.id)
        if len(said) > cells:
            die()

    run_module.write_done = write_done
    sweep(content, out=out)


def sweep_until_step(content, out, cell, step):
    """Dies in the middle of a step of the training of that cell."""
    honest, begun = Recorder.on_pre_optimizer_step, []

    def deadly(recorder, arguments, state, control, **kwargs):
        begun.extend([state.global_step] if state.global_step == 0 else [])
        if len(begun) > cell and state.global_step == step:
            die()
        honest(recorder)

    Recorder.on_pre_optimizer_step = deadly
    sweep(content, out=out)


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True], ids=["before-the-marker", "behind-the-marker"])
def test_a_sweep_killed_by_kill_9_between_cells_and_resumed_gives_identical_outputs(here, whole):
    content = lexical({"k": [1, 2, 3, 4, 5, 6]})
    dies(sweep_until_marker, content, here / "cut", 2, whole)
    counts = sweep_report(here / "cut").counts()
    # A claim of a process that is dead does not count as work.
    assert counts == ({"done": 3, "missing": 3} if whole else {"done": 2, "missing": 4})
    before = results(here / "cut")
    resumed, alone = sweep(content, out=here / "cut"), sweep(content, out=here / "alone")
    assert resumed.counts() == alone.counts() == {"done": 6}
    assert results(here / "cut") == results(here / "alone")
    assert before.items() <= results(here / "cut").items()
    for row, other in zip(resumed.rows, alone.rows, strict=True):
        assert (row.cell, row.settings, row.point) == (other.cell, other.settings, other.point)


@pytest.mark.slow
def test_a_sweep_killed_by_kill_9_within_a_training_and_resumed_gives_identical_outputs(tmp_path, trainings):
    dies(sweep_until_step, trainings, tmp_path / "cut", 1, 4)
    assert sweep_report(tmp_path / "cut").counts()["done"] == 1
    begun = next(path for path in (tmp_path / "cut" / "cells").iterdir() if not (path / "done.json").exists())
    assert list(TrainingRun.open(begun / "out").checkpoints) == [0, 3], "it goes on from there"
    sweep(trainings, out=tmp_path / "cut")
    sweep(trainings, out=tmp_path / "alone")
    found, expected = results(tmp_path / "cut"), results(tmp_path / "alone")
    assert set(found) == set(expected)
    assert [name for name in expected if found[name] != expected[name]] == []
    assert sum(name.endswith("model.safetensors") for name in expected) == 9


@pytest.mark.slow
def test_a_training_in_a_rank_of_torchrun_is_no_part_of_a_process_group(tmp_path, trainings, monkeypatch):
    """A Trainer that found LOCAL_RANK alone wrapped its model for a group of one."""
    environment = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    two = trainings | {"axes": {"split_seed": [0, 1]}}
    with pytest.raises(WorkElsewhere):  # The share of the first rank, which this one would wait for.
        sweep(two, out=tmp_path / "sw", shard="1/2")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    seen, honest = [], Recorder.on_pre_optimizer_step
    inside = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

    def on_pre_optimizer_step(recorder, *_, **__):
        seen.append((torch.distributed.is_initialized(), [name for name in inside if name in os.environ]))
        honest(recorder)

    monkeypatch.setattr(Recorder, "on_pre_optimizer_step", on_pre_optimizer_step)
    assert sweep(two, out=tmp_path / "sw").counts() == {"done": 2}
    assert seen
    assert all(each == (False, []) for each in seen)
    assert {name: os.environ[name] for name in environment} == environment


@pytest.mark.slow
def test_a_cell_in_a_worker_has_workers_of_its_own(workshop, tmp_path, monkeypatch):
    monkeypatch.setenv("VESTIGE_QUIET", "1")
    base = {"model": str(workshop / "tiny-model"), "data": str(workshop / "train.jsonl"), "device": "cpu"}
    content = {"verb": "index", "base": base | {"compress": "tensorsketch:16"}, "axes": {"seed": [0]}}
    alone = sweep(content, out=tmp_path / "alone")
    role = Role("worker", str(tmp_path / "elsewhere"), parent=os.getppid())
    honest = run_module.run_cell

    def in_a_worker(cell):
        monkeypatch.setenv(ROLE_VARIABLE, role.as_environment()[ROLE_VARIABLE])
        honest(cell)
        monkeypatch.delenv(ROLE_VARIABLE)

    monkeypatch.setattr(run_module, "run_cell", in_a_worker)
    nested = sweep(content | {"base": content["base"] | {"workers": 2}}, out=tmp_path / "nested")
    assert [row.cell for row in nested.rows] == [row.cell for row in alone.rows]
    assert list((tmp_path / "nested" / "cells").glob("*/out/launch/*/logs/worker-*.log"))
    assert results(tmp_path / "nested") == results(tmp_path / "alone")


@pytest.mark.slow
def test_a_grid_of_the_alarm_says_when_it_rang_and_how_many_it_flagged(tmp_path, trainings):
    alarm = {"split_fraction": 1.0, "alarm": True, "alarm_measure": "loss", "alarm_window": 4, "epochs": 1}
    axes = {"alarm_below": [0.5, 0.999], "alarm_quantile": [0.25]}
    report = sweep(trainings | {"base": trainings["base"] | alarm, "axes": axes}, out=tmp_path / "sw")
    silent, rang = report.rows
    assert {"alarm.step", "alarm.flagged"} & set(silent.figures) == set()
    listed = parquet.read_table(Path(rang.folder) / "at_risk.parquet").to_pylist()
    assert rang.figures["alarm.step"] == listed[0]["step"] > 0
    assert rang.figures["alarm.flagged"] == sum(row["flagged"] for row in listed) == 3
    columns = parquet.read_table(tmp_path / "sw" / "cells.parquet").to_pydict()
    assert columns["figures.alarm.flagged"] == [None, 3]


def test_cells_that_submit_jobs_or_need_more_processors_than_a_job_has_are_refused(here):
    content = lexical({"k": [1, 2]})
    inner = content | {"base": content["base"] | {"engine": "slurm"}}
    with pytest.raises(SpecError, match="the sweep must be one process"):
        sweep(inner, out=here / "sw", workers=2)
    inner = content | {"base": content["base"] | {"workers": 2, "threads": 3}}
    with pytest.raises(SpecError, match="Give the sweep threads=6"):
        sweep(inner, out=here / "sw", engine="slurm", workers=2)
    assert not (here / "sw").exists()
