"""Faults of a real SLURM: nodes that die, tasks that live on without theirs, limits, preemption; one result."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.indexes.synthetic import hashes
from tests.jobs import slurm
from tests.jobs.toy import Toy
from tests.workshop import furnish, write_rows
from vestige.errors import WorkElsewhere
from vestige.jobs import JobFolder, is_alive

pytestmark = pytest.mark.slow


@pytest.fixture
def idle_slurm(on_slurm):
    slurm.wait_until_idle(on_slurm, 60)
    return on_slurm


def test_an_index_of_1000_examples_survives_a_dead_node_a_time_limit_and_a_cancelled_task(idle_slurm, tmp_path):
    furnish(tmp_path)
    rows = [{"id": f"e{n}", "prompt": f"What is {n}?", "completion": f"{n} is {n % 7}."} for n in range(1000)]
    write_rows(tmp_path / "train.jsonl", rows)
    alone = [sys.executable, "-m", "vestige.cli", "index", "--model", str(tmp_path / "tiny-model")]
    alone += ["--data", str(tmp_path / "train.jsonl"), "--compress", "tensorsketch:16"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "VESTIGE_QUIET": "1"}
    subprocess.run([*alone, "--out", str(tmp_path / "one")], check=True, env=environment)
    many = [*alone, "--out", str(tmp_path / "many"), "--engine", "slurm", "--workers", "8", "--time", "1"]
    with subprocess.Popen(many, env=environment) as driver:
        job = JobFolder.of(tmp_path / "many", "Indexing")
        _wait_for(lambda: len(job.read_job().get("jobs", [])) == 2)
        array = job.read_job()["jobs"][0]
        slurm.ask(idle_slurm, "scancel", f"{array}_6")
        hung = _hang(job, lambda piece: not (tmp_path / "many" / "shards" / f"{piece:05d}.json").exists())
        killed = _first_worker(job, other_than=hung)
        node = slurm.node_of(idle_slurm, killed.job)
        # A node dies: its daemon, the one of the task, and the task.
        slurm.kill_node(idle_slurm, node)
        for process in [psutil.Process(killed.pid).parent(), psutil.Process(killed.pid)]:
            process.kill()
        _wait_for(lambda: "down" in slurm.ask(idle_slurm, "sinfo", "-hN", "-n", node, "-p", "main", "-o", "%t"))
        slurm.start_node(idle_slurm, node)
        assert driver.wait(240) == 0
    heard = (job.logs / f"{hung.job}.log").read_text()
    assert "stopped by signal 10 after" in heard
    said = (idle_slurm.folder / "log" / "slurmctld.log").read_text()
    assert f"Requeuing JobId={hung.job}(" in said
    assert f"Nodes {node} not responding, setting DOWN" in said
    assert hashes(tmp_path / "many") == hashes(tmp_path / "one")


def test_two_live_copies_of_a_task_whose_node_lost_its_daemon_do_no_harm(idle_slurm, tmp_path):
    plan = Toy(tmp_path, count=24, seconds=1.5, steps=10)
    with pytest.raises(WorkElsewhere):
        plan.run(engine="slurm", workers=1, wait=False)
    job = JobFolder.of(tmp_path, plan.name)
    first = _first_worker(job)
    node = slurm.node_of(idle_slurm, first.job)
    slurm.kill_node(idle_slurm, node)
    # What SLURM does by itself after SlurmdTimeout: the node is down, and its job is queued again elsewhere.
    slurm.ask(idle_slurm, "scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    second = _first_worker(job, other_than=first)
    assert second.job == first.job
    assert is_alive(first)
    assert is_alive(second)
    slurm.start_node(idle_slurm, node)
    slurm.ask(idle_slurm, "scontrol", "update", f"nodename={node}", "state=resume")
    _wait_for((tmp_path / "result.txt").exists, 120)
    assert (tmp_path / "result.txt").read_text() == plan.expected()
    # Both have the same share, and so do the same pieces for as long as both live.
    assert set(plan.computed()) == set(range(24))
    assert len(plan.computed()) <= 2 * 24


def test_a_preempted_task_gives_its_piece_back_and_goes_on_later(idle_slurm, tmp_path):
    plan = Toy(tmp_path, count=16, seconds=1.5, steps=10)
    with pytest.raises(WorkElsewhere):
        plan.run(engine="slurm", workers=1, wait=False)
    job = JobFolder.of(tmp_path, plan.name)
    first = _first_worker(job)
    urgent = ("--partition=urgent", f"--nodelist={slurm.node_of(idle_slurm, first.job)}", "--mem=100")
    slurm.ask(idle_slurm, "sbatch", *urgent, "--output=/dev/null", "--wrap", "sleep 1")
    _wait_for((tmp_path / "result.txt").exists, 120)
    assert (tmp_path / "result.txt").read_text() == plan.expected()
    said = "".join(path.read_text() for path in job.logs.glob("*_0.log"))
    assert said.count("stopped by signal 15") == 1
    assert len(plan.computed()) <= 17


def _hang(job, is_undone):
    """A worker that hangs amid a piece until the warning before its limit of a minute, the shortest that there is."""
    while True:
        worker = _first_worker(job)
        os.kill(worker.pid, signal.SIGSTOP)
        held = [each.at_work for each in job.journals() if each.worker == worker and each.at_work is not None]
        if any(map(is_undone, held)):
            return worker
        os.kill(worker.pid, signal.SIGCONT)


def _first_worker(job, other_than=None):
    """A worker that has begun a piece."""
    found = []

    def look():
        held = [each.worker for each in job.journals() if each.at_work is not None]
        found[:] = [one for one in held if one != other_than and is_alive(one)]
        return found

    _wait_for(look)
    return found[0]


def _wait_for(condition, seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
