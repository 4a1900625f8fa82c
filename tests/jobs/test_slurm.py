"""A real SLURM: arrays complete by themselves, whatever becomes of their tasks, and the bytes are the same."""

import os
import signal
import subprocess
import time

import pytest

from tests.jobs import slurm
from tests.jobs.toy import Toy
from vestige.errors import PieceFailed, UserError, WorkElsewhere
from vestige.jobs import JobFolder
from vestige.settings import LaunchSettings


@pytest.mark.slow
def test_an_array_does_the_pieces_and_the_driver_reduces(on_slurm, tmp_path):
    plan = Toy(tmp_path, count=8, seconds=0.1)
    assert plan.run(engine="slurm", workers=3) == plan.expected()
    assert sorted(plan.computed()) == list(range(8))
    _wait_for(lambda: not slurm.ask(on_slurm, "squeue", "-h"))


@pytest.mark.slow
def test_without_a_waiting_driver_the_job_after_the_array_reduces(on_slurm, tmp_path):
    plan = Toy(tmp_path, count=6)
    with pytest.raises(WorkElsewhere, match="vestige status"):
        plan.run(engine="slurm", workers=2, wait=False)
    _wait_for((tmp_path / "result.txt").exists)
    assert (tmp_path / "result.txt").read_text() == plan.expected()


@pytest.mark.slow
def test_a_failing_piece_is_reported_with_its_log(on_slurm, tmp_path):
    with pytest.raises(PieceFailed, match="cannot square 3") as caught:
        Toy(tmp_path, count=5, fail=(3,)).run(engine="slurm", workers=2, retries=1)
    assert "/logs/" in str(caught.value)


@pytest.mark.slow
def test_a_piece_that_kills_its_worker_is_given_up_and_the_others_are_done(on_slurm, tmp_path):
    plan = Toy(tmp_path, count=5, deadly=(1,))
    with pytest.raises(PieceFailed, match=r"piece 1, 2 times, .* its worker died"):
        plan.run(engine="slurm", workers=1, retries=1)
    assert [piece for piece in range(5) if not plan.is_done(piece)] == [1]


@pytest.mark.parametrize("seconds", ["", "soon", "-1", "nan"])
def test_a_wrong_number_of_seconds_is_an_instruction(tmp_path, paper_slurm, monkeypatch, seconds):
    monkeypatch.setenv("VESTIGE_QUEUE_SECONDS", seconds)
    with pytest.raises(UserError, match=r"VESTIGE_QUEUE_SECONDS was .* expected a number of seconds"):
        Toy(tmp_path).run(engine="slurm")


@pytest.mark.slow
def test_tasks_killed_cancelled_and_warned_of_their_limit_leave_nothing_undone(on_slurm, tmp_path):
    plan = Toy(tmp_path, count=24, seconds=1.0, steps=10)
    with pytest.raises(WorkElsewhere):
        plan.run(engine="slurm", workers=8, wait=False, retries=5)
    # One of those that wait is cancelled; of two that run, one dies by -9, the other hears that its limit is near.
    job = JobFolder.of(tmp_path, plan.name)
    slurm.ask(on_slurm, "scancel", f"{job.read_job()['jobs'][0]}_5")
    begun = []
    _wait_for(lambda: begun.append(_at_work(job)) or len(begun[-1]) == 2)
    killed, warned = begun[-1]
    os.kill(killed.pid, signal.SIGKILL)
    slurm.ask(on_slurm, "scancel", "--batch", "--signal=USR1", warned.job)
    _wait_for((tmp_path / "result.txt").exists, 120)
    assert (tmp_path / "result.txt").read_text() == plan.expected()
    assert 24 <= len(plan.computed()) <= 24 + 3


@pytest.mark.slow
def test_a_job_that_hits_its_time_limit_is_queued_again_and_goes_on(on_slurm, tmp_path):
    # One minute is the shortest limit that SLURM knows; the pieces take longer than that together.
    plan = Toy(tmp_path, count=20, seconds=2.5, steps=10)
    assert plan.run(engine="slurm", workers=1, time="1") == plan.expected()
    job = JobFolder.of(tmp_path, plan.name)
    said = "".join(path.read_text() for path in job.logs.glob("*_0.log"))
    assert said.count("stopped by signal 10") >= 1
    # Only the piece in flight is begun again, once for each stop.
    assert len(plan.computed()) <= 20 + said.count("stopped by signal 10")


@pytest.mark.parametrize(
    ("limit", "warning"),
    [
        ("0:30", 10),
        ("5", 60),
        ("1:00", 12),
        ("0:05:00", 60),
        ("2-0", 120),
        ("0-0:5", 60),
        ("0-0:4:10", 50),
        ("abc", 120),
    ],
)
def test_the_warning_comes_a_fifth_of_the_time_limit_before_it(tmp_path, paper_slurm, limit, warning):
    with pytest.raises(WorkElsewhere):
        Toy(tmp_path).run(engine="slurm", wait=False, time=limit)
    assert f"--signal=B:USR1@{warning}" in paper_slurm()[0]


def test_a_machine_without_slurm_says_where_to_go(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="login node"):
        Toy(tmp_path).run(engine="slurm", workers=2)


def test_a_silent_scheduler_is_not_waited_for(tmp_path, monkeypatch):
    def silent(words, *, timeout, **_):
        raise subprocess.TimeoutExpired(words[0], timeout)

    monkeypatch.setattr("subprocess.run", silent)
    with pytest.raises(UserError, match="did not answer within 30 s"):
        Toy(tmp_path).run(engine="slurm", workers=2)


def test_arrays_respect_the_largest_size(tmp_path, paper_slurm, monkeypatch):
    monkeypatch.setenv("VESTIGE_TEST_ARRAY_SIZE", "4")
    plan = Toy(tmp_path)
    with pytest.raises(WorkElsewhere):
        plan.run(**LaunchSettings(engine="slurm", workers=10, wait=False, time="0:50", gres="gpu:1").model_dump())
    submitted = paper_slurm()
    arrays = [option for options in submitted for option in options if option.startswith("--array")]
    assert arrays == ["--array=0-3", "--array=0-3", "--array=0-1"]
    assert "--dependency=afterany:1:2:3" in submitted[-1]
    assert {"--gres=gpu:1", "--time=0:50", "--requeue", "--signal=B:USR1@10"} <= set(submitted[0])


def _at_work(job):
    return [each.worker for each in job.journals() if each.at_work is not None]


def _wait_for(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)
