"""Death at any moment of `vestige precondition`: the same command ends with the same bytes."""

import multiprocessing
import os
import random
import shutil
import signal
import sys
import time

import pytest
import torch

from tests.indexes.synthetic import build, hashes
from vestige.curvature import precondition, read_preconditioned
from vestige.indexes import Index

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["vestige.curvature", "tests.indexes.synthetic", "pandas"])
ROWS = 8


def work(folder, seconds=0.0):
    """Curvature and preconditioned rows of `folder/index`, every shard a piece; each shard read takes `seconds`."""
    original = Index.blocks

    def slow(self, *args, **kwargs):
        time.sleep(seconds)
        return original(self, *args, **kwargs)

    groups = Index.shard_groups
    Index.shard_groups = lambda self, max_bytes: groups(self, min(max_bytes, 1))
    Index.blocks = slow
    try:
        precondition(index=folder / "index", out=folder / "out", damping=0.1)
    finally:
        Index.blocks, Index.shard_groups = original, groups


def work_and_die(folder, step, count):
    """Work, and die by SIGKILL just before the `step`-th change to a file or folder; write all steps to `count`."""
    seen = 0
    torch.set_num_threads(1)

    def watch(event, args):
        nonlocal seen
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        changes = event in ("os.rename", "os.link", "os.remove", "os.mkdir") or writes
        if changes and str(folder) in str(args[0]):
            if seen == step:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    sys.addaudithook(watch)
    work(folder)
    count.value = seen


@pytest.fixture(scope="module")
def indexed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("indexed")
    build(folder / "index", ROWS)
    return folder / "index"


@pytest.fixture(scope="module")
def whole(indexed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    shutil.copytree(indexed, folder / "index")
    torch.set_num_threads(1)
    work(folder)
    return finished(folder)


def finished(folder):
    """Digests of what there is, but for what the job notes beside its results, with times and hosts."""
    return {name: digest for name, digest in hashes(folder).items() if "launch/" not in name}


@pytest.mark.slow
def test_death_before_changes_on_disk_is_survived(indexed, whole, tmp_path):
    count = PROCESSES.Value("i", 0)

    def die_at(step, folder):
        if not folder.exists():
            shutil.copytree(indexed, folder / "index")
        child = PROCESSES.Process(target=work_and_die, args=(folder, step, count))
        child.start()
        child.join()
        return child.exitcode

    assert die_at(-1, tmp_path / "counted") == 0
    assert finished(tmp_path / "counted") == whole
    assert count.value > 20
    # Every change would take a minute; the stride falls on every kind of them: claims, tensors, markers, records.
    for step in range(2, count.value, count.value // 5):
        folder = tmp_path / f"{step}"
        assert die_at(step, folder) == -signal.SIGKILL
        work(folder)
        assert finished(folder) == whole, f"killed before change {step}"


@pytest.mark.slow
def test_kills_at_random_moments_change_no_byte(indexed, whole, tmp_path):
    folder, moments, killed = tmp_path / "job", random.Random(0), 0
    shutil.copytree(indexed, folder / "index")
    for _ in range(12):
        child = PROCESSES.Process(target=work, args=(folder, 0.05))
        child.start()
        child.join(moments.uniform(0.08, 0.25))
        if child.exitcode is None:
            assert child.pid is not None
            os.kill(child.pid, signal.SIGKILL)
            child.join()
            killed += 1
        if child.exitcode == 0:
            break
    assert killed > 2, "the kills came too late to show anything"
    work(folder)
    assert finished(folder) == whole
    rows = [row for block in read_preconditioned(folder / "out") for row in block.example.tolist()]
    assert sorted(rows) == list(range(ROWS))
