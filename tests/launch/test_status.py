"""What a person sees of a job while it runs, and how it ends on request."""

import re
import signal
import subprocess
import time

import pytest

from tests.launch.toy import ToyPlan
from vestige.cli import main
from vestige.errors import PieceFailed, UserError
from vestige.launch import cancel_jobs, job_statuses
from vestige.settings import LaunchSettings


def test_a_finished_job_says_its_cost(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    ToyPlan(tmp_path, pieces=4, seconds=0.05).run()
    (job,) = job_statuses(tmp_path)
    assert (job.name, job.state, job.done, job.pieces, job.running) == ("Squaring", "done", 4, 4, ())
    assert job.core_hours == pytest.approx(3 * 4 * 0.05 / 3600, rel=0.5)
    assert job.gpu_hours == 0
    assert job.rate > 0


def test_failures_are_told_with_their_error(tmp_path, capsys):
    with pytest.raises(PieceFailed):
        ToyPlan(tmp_path, pieces=4, fail=(1,)).run(retries=1)
    main(["status", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "Squaring: stopped: the same command continues it" in shown or "Squaring: running" in shown
    assert "3 of 4 done" in shown
    assert "piece 1, 2 times: ArithmeticError: cannot square 1" in shown


def test_status_and_cancel_of_a_job_at_work(tmp_path):
    plan = ToyPlan(tmp_path, pieces=10, seconds=20, steps=200)
    with subprocess.Popen(plan.command(LaunchSettings(workers=2)), stderr=subprocess.PIPE, text=True) as driver:
        deadline = time.monotonic() + 20
        while not (jobs := job_statuses(tmp_path)) or len(jobs[0].running) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert jobs[0].state == "running"
        assert re.search(r"0 of 10 done, 2 at work \(0-1\)", "\n".join(jobs[0].lines()))
        said = cancel_jobs(tmp_path)
        assert any(f"process {driver.pid} ends" in line for line in said)
        assert driver.wait(20) == 128 + signal.SIGTERM
        driver.stderr.read()
    (job,) = job_statuses(tmp_path)
    assert (job.state, job.running) == ("cancelled", ())
    assert ToyPlan(tmp_path, pieces=10).run() == plan.expected()
    assert job_statuses(tmp_path)[0].state == "done"


def test_cancel_where_nothing_ran_is_an_instruction(tmp_path):
    with pytest.raises(UserError, match="No job has worked on"):
        cancel_jobs(tmp_path)
