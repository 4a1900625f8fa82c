"""Sweeps where others decide which process does what: a real SLURM, and torchrun."""

import os
import subprocess
import sys
import time

import pytest
import torch

from tests.launch import slurm
from tests.sweep.conftest import lexical, results, write_texts
from vestige.errors import WorkElsewhere
from vestige.launch import own_jobs
from vestige.models._load import own_gpu
from vestige.sweep import sweep, sweep_report

CELLS = {"k": list(range(1, 9))}

# Loaded by every worker: the first one that has done the work of a third cell dies before it says so.
DEADLY = """
import os, pathlib, signal
from vestige.sweep import _plan

honest, said = _plan.write_done, []

def write_done(cell, done):
    if len(said) == 2:
        try:
            pathlib.Path({once!r}).unlink()
        except FileNotFoundError:
            pass
        else:
            os.kill(os.getpid(), signal.SIGKILL)
    said.append(cell.id)
    honest(cell, done)

_plan.write_done = write_done
"""


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """A folder with texts, and what one process makes of the cells."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VESTIGE_QUIET", "1")
    write_texts(tmp_path)
    sweep(lexical(CELLS), out=tmp_path / "alone")
    return results(tmp_path / "alone")


def test_a_sweep_on_slurm_whose_job_is_killed_completes_with_the_same_outputs(on_slurm, tmp_path, alone):
    (tmp_path / "deadly").mkdir()
    (tmp_path / "once").touch()
    (tmp_path / "deadly" / "sitecustomize.py").write_text(DEADLY.format(once=str(tmp_path / "once")))
    deadly = {"setup": f"export PYTHONPATH={tmp_path / 'deadly'}", "mem": "500M"}
    with pytest.raises(WorkElsewhere, match="vestige status"):
        sweep(lexical(CELLS), out=tmp_path / "sw", engine="slurm", workers=2, wait=False, **deadly)
    deadline = time.monotonic() + 300
    while not (tmp_path / "sw" / "cells.parquet").exists():
        assert time.monotonic() < deadline, slurm.ask(on_slurm, "squeue")
        time.sleep(0.1)
    assert not (tmp_path / "once").exists(), "a job was killed"
    assert sweep_report(tmp_path / "sw").counts() == {"done": 8}
    assert results(tmp_path / "sw") == alone


@pytest.mark.parametrize(
    ("visible", "cards", "place", "card"), [(None, 4, "1", "1"), ("4,5", 2, "1", "5"), ("6", 1, "3", "6")]
)
def test_a_cell_in_a_rank_sees_the_card_of_its_rank_and_no_other(monkeypatch, visible, cards, place, card):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    given = {"RANK": place, "WORLD_SIZE": "4", "LOCAL_RANK": place, "MASTER_PORT": "1"}
    given |= {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with own_jobs():
        assert os.environ["CUDA_VISIBLE_DEVICES"] == card
        assert own_gpu(os.environ, 1) == 0
        # Should CUDA have been asked before, it shows as many as it did then.
        assert own_gpu(os.environ, 4) == int(place)
        assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"} & set(os.environ)
    assert {name: os.environ.get(name) for name in given} == given
    assert ("CUDA_VISIBLE_DEVICES" in os.environ) == (visible is not None)
    assert "SLURM_LOCALID" not in os.environ


def test_the_ranks_of_torchrun_share_the_cells_of_a_sweep(tmp_path, alone):
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "vestige.cli"]
    run = subprocess.run(
        [*words, "sweep", str(next((tmp_path / "alone" / "grids").iterdir())), "--out", "sw"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("sweep of `vestige attribute`, 8 cells: 8 done") == 2
    assert results(tmp_path / "sw") == alone
