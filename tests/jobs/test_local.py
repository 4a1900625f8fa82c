"""Local worker processes: they share the pieces, die and are replaced, and nothing is lost or doubled."""

import random
import re
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

from tests.jobs.toy import Toy
from vestige.errors import DataError, PieceFailed
from vestige.jobs import JobFolder
from vestige.settings import LaunchSettings
from vestige.storage import this_host

ROUNDS = 20


@pytest.mark.slow
def test_workers_share_the_pieces_and_each_opens_the_plan_once(tmp_path):
    plan = Toy(tmp_path, count=8, seconds=0.2)
    assert plan.run(workers=2) == plan.expected()
    assert sorted(plan.computed()) == list(range(8))
    logs = [path.read_text() for path in (tmp_path / "launch" / "squaring" / "logs").iterdir()]
    assert len(logs) == 2
    assert sorted(int(piece) for log in logs for piece in re.findall(r"piece (\d+): done", log)) == list(range(8))


@pytest.mark.slow
def test_the_error_of_a_piece_names_the_log_and_shows_its_end(tmp_path):
    plan = Toy(tmp_path, count=6, fail=(3,))
    with pytest.raises(PieceFailed, match="cannot square 3") as caught:
        plan.run(workers=2, retries=1)
    message = str(caught.value)
    log = re.search(r"log: (\S+)", message)[1]
    assert "ArithmeticError: cannot square 3" in Path(log).read_text()
    assert 'raise ArithmeticError(f"cannot square {piece}")' in message
    assert sorted(set(plan.computed())) == list(range(6))
    assert plan.computed().count(3) == 2


@pytest.mark.slow
def test_an_error_that_the_user_has_to_mend_keeps_its_class(tmp_path):
    with pytest.raises(DataError, match="e1 is not a number"):
        Toy(tmp_path, count=6, refuse=(1,)).run(workers=2)


@pytest.mark.slow
def test_a_piece_that_kills_its_worker_is_given_up_and_the_others_are_done(tmp_path):
    plan = Toy(tmp_path, count=6, deadly=(2,))
    with pytest.raises(PieceFailed, match=r"its worker died .SIGKILL: often too little memory"):
        plan.run(workers=2, retries=1)
    assert [piece for piece in range(6) if not plan.is_done(piece)] == [2]


def test_workers_that_do_not_even_begin_are_an_error_with_their_words(tmp_path, monkeypatch):
    plan = Toy(tmp_path, count=6)
    monkeypatch.setattr(Toy, "command", lambda *_: ["sh", "-c", "echo no such module; exit 3"])
    with pytest.raises(PieceFailed, match=r"exit status 3[\s\S]*no such module"):
        plan.run(workers=2)


@pytest.mark.slow
def test_what_a_killed_worker_had_half_written_is_gone_at_the_end(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    plan = Toy(tmp_path, count=2)
    stray = tmp_path / f"00001.txt.tmp.{this_host()}.{dead.pid}.00ff.3"
    stray.touch()
    plan.run(workers=2)
    assert not stray.exists()


def _kill_at_random(driver: subprocess.Popen, seed: int) -> int:
    """Kill workers, once in a while the driver as well; how many were killed."""
    chance, killed = random.Random(seed), 0
    while driver.poll() is None and killed < 3:
        time.sleep(chance.uniform(0.15, 0.5))
        workers = psutil.Process(driver.pid).children() if driver.poll() is None else []
        if workers and chance.random() < 0.85:
            # One that ended by itself meanwhile was not killed.
            with suppress(psutil.NoSuchProcess):
                chance.choice(workers).kill()
                killed += 1
        else:
            driver.kill()
            killed += 1
    return killed


@pytest.mark.slow
def test_twenty_rounds_of_random_kills_lose_nothing_and_double_nothing(tmp_path):
    killed = 0
    for seed in range(ROUNDS):
        plan = Toy(tmp_path / str(seed), count=16, seconds=0.05)
        command = plan.command(LaunchSettings(workers=4, retries=10))
        for attempt in range(10):
            driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            killed += _kill_at_random(driver, 100 * seed + attempt) if attempt < 2 else 0
            answer = driver.communicate()[0].strip()
            if driver.returncode == 0:
                break
        assert answer == plan.expected()
        files = {path.name for path in plan.folder.iterdir()} - {"launch", "computed.log", "result.txt"}
        assert files == {f"{piece:05d}.{kind}" for piece in range(16) for kind in ("txt", "json")}
        # A piece is begun again only if whoever computed it was killed.
        assert len(plan.computed()) <= 16 + 5 * 6
    assert killed >= ROUNDS


@pytest.mark.slow
def test_two_drivers_at_once_do_no_harm_and_meet_in_the_middle(tmp_path):
    plan = Toy(tmp_path, count=24, seconds=0.15)
    command = plan.command(LaunchSettings(workers=2))
    drivers = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) for _ in "ab"]
    assert [driver.communicate()[0].strip() for driver in drivers] == [plan.expected()] * 2
    assert set(plan.computed()) == set(range(24))
    # Those at work where the two meet are done twice.
    assert len(plan.computed()) <= 24 + 4


@pytest.mark.slow
def test_a_stopped_driver_stops_its_workers(tmp_path):
    plan = Toy(tmp_path, count=8, seconds=30, steps=300)
    with subprocess.Popen(plan.command(LaunchSettings(workers=2)), stderr=subprocess.PIPE, text=True) as driver:
        _wait_for(lambda: len(_at_work(plan)) == 2)
        workers = psutil.Process(driver.pid).children()
        driver.send_signal(signal.SIGTERM)
        assert driver.wait(20) == 128 + signal.SIGTERM
        assert "Run the same command again" in driver.stderr.read()
    assert not any(worker.is_running() for worker in workers)
    assert _at_work(plan) == []


@pytest.mark.slow
def test_workers_of_a_killed_driver_end_at_the_next_batch(tmp_path):
    plan = Toy(tmp_path, count=8, seconds=30, steps=300)
    driver = subprocess.Popen(plan.command(LaunchSettings(workers=2)), stderr=subprocess.DEVNULL)
    _wait_for(lambda: len(_at_work(plan)) == 2)
    driver.kill()
    driver.wait()
    _wait_for(lambda: not _at_work(plan))


@pytest.mark.slow
def test_the_replacement_of_a_worker_takes_its_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    plan = Toy(tmp_path, count=4, deadly=(1,), seconds=0.3)
    cards, start = [], subprocess.Popen

    def noted(*words, **options):
        cards.append(options["env"]["CUDA_VISIBLE_DEVICES"])
        return start(*words, **options)

    monkeypatch.setattr(subprocess, "Popen", noted)
    with pytest.raises(PieceFailed):
        plan.run(workers=2, retries=0)
    assert cards[:2] == ["0", "1"]
    assert len(cards) == 3
    logs = [path.read_text() for path in sorted(tmp_path.glob("launch/squaring/logs/*.log"))]
    (dead,) = [number for number, log in enumerate(logs[:2]) if "piece 1: begun" in log]
    assert cards[2] == str(dead)


def _at_work(plan):
    return [each for each in JobFolder.of(plan.folder, plan.name).journals() if each.at_work is not None]


def _wait_for(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
