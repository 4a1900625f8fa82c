"""What a person sees of a job while it runs, and how it ends on request."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.launch.toy import ToyPlan
from vestige.cli import main
from vestige.errors import CorruptFile, PieceFailed, UserError
from vestige.launch import cancel_jobs, job_statuses, start_time
from vestige.settings import LaunchSettings
from vestige.storage import this_host


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


@pytest.mark.slow
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


def _foreign(folder, **changes):
    """A job's record as somebody else may have changed it."""
    ToyPlan(folder, pieces=2).run()
    path = folder / "launch" / "squaring" / "job.json"
    record = json.loads(path.read_text()) | {"ended": None} | changes
    path.write_text(json.dumps({name: value for name, value in record.items() if value != "left out"}))
    return path.parent


@pytest.mark.parametrize(
    "changes",
    [
        {"jobs": ["--user=victim", "--state=RUNNING"]},
        {"jobs": ["17", "18 --user=victim"]},
        {"jobs": ["17_"]},
        {"jobs": ["17\n"]},
        {"jobs": "17"},
        {"name": "left out"},
        {"begun": "left out"},
        {"begun": float("nan")},
        {"pieces": -1},
        {"driver": ["host", -1, 0.0, "", "t"]},
        {"driver": [1, 2]},
    ],
)
def test_a_record_that_is_not_ours_ends_nothing_and_is_named(tmp_path, monkeypatch, changes):
    _foreign(tmp_path, **changes)
    monkeypatch.setattr(subprocess, "run", lambda *words, **_: pytest.fail(f"called {words}"))
    for asked in (cancel_jobs, job_statuses):
        with pytest.raises(CorruptFile, match=r"job\.json is not the record of a job"):
            asked(tmp_path)


def test_ids_of_jobs_stand_behind_the_options(tmp_path, monkeypatch):
    _foreign(tmp_path, jobs=["17", "18_3"], driver=None)
    called = []
    done = subprocess.CompletedProcess([], 0, "", "")
    monkeypatch.setattr(subprocess, "run", lambda words, **_: called.append(words) or done)
    cancel_jobs(tmp_path)
    assert called == [["scancel", "--", "17", "18_3"]]


def test_a_process_that_does_not_work_on_the_folder_is_left_alone(tmp_path):
    other = tmp_path / "other"
    words = [sys.executable, "-c", "import time; time.sleep(60)", "vestige", str(other)]
    with subprocess.Popen(words) as innocent:
        born = start_time(psutil.Process(innocent.pid))
        worker = [this_host(), innocent.pid, born, "", "token"]
        home = _foreign(tmp_path / "job", driver=worker)
        (home / "claims" / "00000.json").write_text(json.dumps([*worker, 0]))
        (said,) = cancel_jobs(tmp_path / "job")
        assert "it was left alone" in said
        assert innocent.poll() is None
        innocent.kill()


def test_claims_and_journals_of_others_are_passed_over(tmp_path):
    home = _foreign(tmp_path, driver=None)
    me = start_time(psutil.Process())
    for name, content in {
        "00000": [1, 2],
        "x": [this_host(), os.getpid(), "soon", "", "t", 0],
        "00001": "{" * 9,
    }.items():
        (home / "claims" / f"{name}.json").write_text(json.dumps(content))
    (home / "claims" / "\u00b2.json").write_text(json.dumps([this_host(), os.getpid(), me, "", "t", 0]))
    (home / "journal" / "x.jsonl").write_text('[0, "a", 1, 1, 1, 1, "h", ""]\n[1e999, 0]\nnull\n' + "[" * 5000)
    (home / "failures" / ("9" * 100 + ".json")).write_text("{}")
    (job,) = job_statuses(tmp_path)
    assert (job.running, job.failures) == ((), ())


@pytest.mark.parametrize("step", [2, 3600, -86400])
def test_a_claim_lives_on_when_the_clock_is_set(step, tmp_path, monkeypatch):
    home = _foreign(tmp_path, driver=None)
    worker = [this_host(), os.getpid(), start_time(psutil.Process()), "", "t"]
    (home / "claims" / "00000.json").write_text(json.dumps([*worker, 0]))
    before = job_statuses(tmp_path)[0].running
    made = psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda process: made(process) + step)  # as after `date --set`
    after = job_statuses(tmp_path)[0].running
    assert before == after == (0,)


def test_a_wrong_number_of_seconds_is_an_instruction(tmp_path, monkeypatch):
    for given in ("abc", "nan", "-1", ""):
        monkeypatch.setenv("VESTIGE_STALE_SECONDS", given)
        with pytest.raises(UserError, match=r"VESTIGE_STALE_SECONDS was .* expected a number of seconds"):
            ToyPlan(tmp_path).run()
