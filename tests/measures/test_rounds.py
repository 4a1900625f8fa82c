"""An audit in pieces: whoever makes them, killed or not, and however few states lie on disk at once."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys

import pytest

from tests.measures.audited import evidence, simple, small_pieces
from vestige.errors import DiskSpaceError, WorkElsewhere
from vestige.measures import _forward
from vestige.storage import partial_folder

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["vestige.measures", "tests.workshop", "transformers.models.llama"])
AT_START = """
import sys
if "vestige.cli" in sys.orig_argv:
    import torch
        torch.set_num_threads(1)
    _forward.PIECE_TOKENS = 300
"""
"""What a process does before all else: a few batches are a piece."""


def audited(place, out, **changes):
    """Two checkpoints in small pieces."""
    with small_pieces():
        return simple(place, out, **{"checkpoints": str(place / "run/checkpoint-10"), "token_budget": 100} | changes)


@pytest.fixture(scope="module")
def undisturbed(place):
    """The evidence of one process that keeps the states of both checkpoints at once."""
    return evidence(audited(place, place / "undisturbed").folder)


def state_folders(out):
    return sorted(path.name for path in partial_folder(out).glob("states/*"))


def audit_and_die(place, out, one_by_one):
    """Die by SIGKILL as the first states of the second checkpoint are about to be there."""
    if one_by_one:
        _forward.ROUND_BYTES = 1
    last = str(partial_folder(out) / "states/00001")

    def watch(event, args):
        if event == "os.rename" and last in str(args[0]):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    audited(place, out)


@pytest.mark.slow
@pytest.mark.parametrize("one_by_one", [True, False])
def test_a_killed_audit_goes_on_and_leaves_the_same_evidence(place, undisturbed, tmp_path, monkeypatch, one_by_one):
    out = tmp_path / "killed"
    child = PROCESSES.Process(target=audit_and_die, args=(place, out, one_by_one))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert not out.exists()
    assert len(list(partial_folder(out).glob("measuring/*.safetensors"))) >= 2
    assert state_folders(out) == (["00001"] if one_by_one else ["00000", "00001"])
    if one_by_one:
        # The layer's states are gone: they have to be made anew for a piece that does not hold what it held.
        monkeypatch.setattr(_forward, "ROUND_BYTES", 1)
        (layer,) = partial_folder(out).glob("layers/*.safetensors")
        content = bytearray(layer.read_bytes())
        content[-1] ^= 1
        layer.write_bytes(content)
    audited(place, out)
    assert evidence(out) == undisturbed
    assert not partial_folder(out).exists()


@pytest.mark.slow
def test_shares_make_the_whole(place, undisturbed, tmp_path, monkeypatch):
    monkeypatch.setattr(_forward, "ROUND_BYTES", 1)
    out, turns = tmp_path / "shares", 0
    for turn in range(12):
        try:
            audited(place, out, shard=f"{turn % 2 + 1}/2")
            break
        except WorkElsewhere:
            turns += 1
            assert len(state_folders(out)) <= 1
    assert turns >= 2, "no share is everything"
    assert evidence(out) == undisturbed


def vestige_audit(place, out, *words, launcher=(sys.executable,), **environment):
    site = place / "site"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(AT_START)
    words = ("--data", "train.jsonl", "--flag", "noisy", "--directions", "200", "--token-budget", "100", *words)
    models = ("--model", "run/checkpoint-30", "--checkpoints", "run/checkpoint-10")
    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [*launcher, "-m", "vestige.cli", "audit", *models, *words, "--out", str(out)],
        cwd=place,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run


@pytest.mark.slow
def test_two_processes_leave_the_evidence_of_one(place, undisturbed, tmp_path):
    out = tmp_path / "workers"
    run = vestige_audit(place, out, "--workers", "2")
    assert all(f"{name}: 2 workers" in run.stderr for name in ("Measuring", "Layers", "Norms")), run.stderr
    assert evidence(out) == undisturbed
    assert not partial_folder(out).exists()


@pytest.mark.slow
def test_under_torchrun_only_the_first_rank_writes_the_run(place, undisturbed, tmp_path):
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    vestige_audit(place, tmp_path / "ranks", launcher=torchrun)
    assert evidence(tmp_path / "ranks") == undisturbed
    assert not partial_folder(tmp_path / "ranks").exists()


@pytest.mark.slow
def test_states_that_do_not_fit_are_told_before_anything_is_looked_at(place, tmp_path, monkeypatch):
    free = type("", (), {"free": 1000})()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    with pytest.raises(DiskSpaceError, match=r"hidden states of 36 examples at 2 layers.*name fewer `layers`"):
        audited(place, tmp_path / "run", layers=("all",))
    assert not list(partial_folder(tmp_path / "run").glob("*/*.safetensors"))
    assert len(audited(place, tmp_path / "run", measures=("loss",)).checkpoints) == 2
