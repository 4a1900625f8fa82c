"""Sweeps where others decide which process does what: a real SLURM, and torchrun."""

import os
import subprocess
import sys
import time

import pytest
from tests.jobs import slurm

from sweep.conftest import lexical, results, write_texts
from vestige.errors import WorkElsewhere
from vestige_recipes.sweep import sweep, sweep_report

CELLS = {"k": list(range(1, 9))}

# Loaded by every worker: the first one that has done the work of a third cell dies before it says so.
DEADLY = """
import os, pathlib, signal
from vestige_recipes.sweep import run

honest, said = run.write_done, []

def write_done(cell, *rest):
    if len(said) == 2:
        try:
            pathlib.Path({once!r}).unlink()
        except FileNotFoundError:
            pass
        else:
            os.kill(os.getpid(), signal.SIGKILL)
    said.append(cell.id)
    honest(cell, *rest)

run.write_done = write_done
"""


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """A folder with texts, and what one process makes of the cells."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VESTIGE_QUIET", "1")
    write_texts(tmp_path)
    sweep(lexical(CELLS), out=tmp_path / "alone")
    return results(tmp_path / "alone")


@pytest.mark.slow
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


@pytest.mark.slow
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
