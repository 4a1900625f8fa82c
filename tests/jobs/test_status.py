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

from tests.jobs.toy import Toy
from vestige.cli import main
from vestige.errors import CorruptFile, PieceFailed, UserError
from vestige.jobs import JOB_FILES, cancel_jobs, job_statuses, start_time
from vestige.settings import LaunchSettings
from vestige.storage import require_no_others, this_host


def test_a_finished_job_says_its_cost(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    Toy(tmp_path, count=4, seconds=0.05).run()
    (job,) = job_statuses(tmp_path)
    assert (job.name, job.state, job.done, job.pieces, job.running) == ("Squaring", "done", 4, 4, ())
    assert job.core_hours == pytest.approx(3 * 4 * 0.05 / 3600, rel=0.5)
    assert job.gpu_hours == 0
    assert job.rate > 0


def test_failures_are_told_with_their_error(tmp_path, capsys):
    with pytest.raises(PieceFailed):
        Toy(tmp_path, count=4, fail=(1,)).run(retries=1)
    main(["status", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "Squaring: stopped: the same command continues it" in shown or "Squaring: running" in shown
    assert "3 of 4 done" in shown
    assert "piece 1, 2 times: ArithmeticError: cannot square 1" in shown


@pytest.mark.slow
def test_status_and_cancel_of_a_job_at_work(tmp_path):
    plan = Toy(tmp_path, count=10, seconds=20, steps=200)
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
    assert Toy(tmp_path, count=10).run() == plan.expected()
    assert job_statuses(tmp_path)[0].state == "done"


def test_cancel_where_nothing_ran_is_an_instruction(tmp_path):
    with pytest.raises(UserError, match="No job has worked on"):
        cancel_jobs(tmp_path)


def _foreign(folder, **changes):
    """A job's record as somebody else may have changed it."""
    Toy(folder, count=2).run()
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
        (home / "journal" / "x.jsonl").write_text(json.dumps({"begun": 0, "worker": worker}) + "\n")
        (said,) = cancel_jobs(tmp_path / "job")
        assert "it was left alone" in said
        assert innocent.poll() is None
        innocent.kill()


def test_journals_of_others_are_passed_over(tmp_path):
    home = _foreign(tmp_path, driver=None)
    me = [this_host(), os.getpid(), start_time(psutil.Process()), "", "t"]
    soon = [this_host(), os.getpid(), "soon", "", "t"]
    lines = {
        "a": '[0, "a", 1, 1, 1, 1, "h", ""]\n[1e999, 0]\nnull\n' + "[" * 5000,
        "b": json.dumps({"begun": 1, "worker": soon}) + "\n" + '{"begun"' * 5000,
        "c": json.dumps({"begun": -1, "worker": me}) + "\n" + json.dumps({"begun": "\u00b2", "worker": me}),
        "d": json.dumps({"begun": 0, "worker": [1, 2]}),
    }
    for name, content in lines.items():
        (home / "journal" / f"{name}.jsonl").write_text(content)
    (home / "failures" / ("9" * 100 + ".json")).write_text("{}")
    (job,) = job_statuses(tmp_path)
    assert (job.running, job.failures) == ((), ())


@pytest.mark.parametrize("step", [2, 3600, -86400])
def test_a_process_is_known_again_when_the_clock_is_set(step, tmp_path, monkeypatch):
    home = _foreign(tmp_path, driver=None)
    worker = [this_host(), os.getpid(), start_time(psutil.Process()), "", "t"]
    (home / "journal" / "x.jsonl").write_text(json.dumps({"begun": 0, "worker": worker}))
    before = job_statuses(tmp_path)[0].running
    made = psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda process: made(process) + step)  # as after `date --set`
    after = job_statuses(tmp_path)[0].running
    assert before == after == (0,)


def test_what_earlier_versions_left_is_no_file_of_others(tmp_path):
    """Claims, which this version does not make, and journals without the process."""
    home = _foreign(tmp_path / "idx", driver=None, jobs=[])
    (home / "claims").mkdir()
    (home / "claims" / "00000.json").write_text("[]")
    (home / "claims" / ".00001.evicted.00ff").write_text("[]")
    (home / "journal" / "old.jsonl").write_text(json.dumps([1, 2.0, 0.5, 2e9, 1, 0, "h", ""]) + "\n")
    require_no_others(tmp_path / "idx", [*JOB_FILES, "[0-9]*.txt", "[0-9]*.json", "result.txt", "computed.log"])
    (job,) = job_statuses(tmp_path / "idx")
    assert (job.done, job.running) == (2, ())
