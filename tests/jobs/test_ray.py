"""A real Ray of two nodes: actors do the pieces, nodes and actors and drivers die, and the bytes are the same."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from tests.indexes.synthetic import hashes
from tests.jobs.toy import Toy
from tests.workshop import furnish, write_rows
from vestige.cli import main
from vestige.errors import MissingExtra, SpecError, UserError
from vestige.jobs import JobFolder, cancel_jobs, is_alive, job_statuses
from vestige.settings import LaunchSettings


def start(plan, cluster, **settings):
    """A driver of its own process: Ray leaves threads behind."""
    chosen = LaunchSettings(**{"engine": "ray", "workers": 2, "address": cluster.address} | settings)
    return subprocess.Popen(plan.command(chosen), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_actors_share_the_pieces_and_the_driver_reduces(on_ray, tmp_path):
    plan = Toy(tmp_path, count=8, seconds=0.1)
    driver = start(plan, on_ray)
    printed, notes = driver.communicate()
    assert printed.strip() == plan.expected(), notes
    assert sorted(plan.computed()) == list(range(8))
    assert len(list((tmp_path / "launch" / "squaring" / "logs").iterdir())) == 2
    # Of Ray's own words none reaches the user.
    assert all(line.startswith("Squaring") for line in notes.strip().splitlines())
    wait_for(lambda: not actors(on_ray))


@pytest.mark.slow
def test_an_index_survives_a_node_and_an_actor_killed_in_the_middle(on_ray, tmp_path):
    furnish(tmp_path)
    rows = [{"id": f"e{n}", "prompt": f"What is {n}?", "completion": f"{n} is {n % 7}."} for n in range(1500)]
    write_rows(tmp_path / "train.jsonl", rows)
    alone = [sys.executable, "-m", "vestige.cli", "index", "--model", str(tmp_path / "tiny-model")]
    alone += ["--data", str(tmp_path / "train.jsonl"), "--compress", "tensorsketch:16"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "VESTIGE_QUIET": "1"}
    subprocess.run([*alone, "--out", str(tmp_path / "one")], check=True, env=environment)
    many = [*alone, "--out", str(tmp_path / "many"), "--engine", "ray", "--workers", "2", "--address", on_ray.address]
    job = JobFolder.of(tmp_path / "many", "Indexing")
    with subprocess.Popen(many, env=environment) as driver:
        held = []

        def hold_both() -> bool:
            # The work goes on only when both have died; one may begin when the other could be done.
            for worker in at_work(job):
                if worker not in held:
                    os.kill(worker.pid, signal.SIGSTOP)
                    held.append(worker)
            return len(held) == 2

        wait_for(hold_both, 120)
        finished = list(tmp_path.glob("many/shards/*.json"))
        on_ray.kill_node()
        (actor,) = on_ray.processes("head", "ray::RayActor")
        actor.kill()
        for worker in held:
            with suppress(ProcessLookupError):
                os.kill(worker.pid, signal.SIGCONT)
        assert driver.wait(300) == 0
    assert len(finished) < len(list(tmp_path.glob("one/shards/*.json")))
    assert hashes(tmp_path / "many") == hashes(tmp_path / "one")
    wait_for(lambda: not any(map(is_alive, held)))


@pytest.mark.slow
def test_failures_are_as_on_one_machine(on_ray, tmp_path):
    plan = Toy(tmp_path, count=8, deadly=(2,), fail=(5,), fail_once=(4,))
    driver = start(plan, on_ray, retries=1)
    notes = driver.communicate()[1]
    assert driver.returncode == 1
    assert "2 of 8 pieces failed every time (2,5)" in notes
    assert "its worker died (SIGKILL: often too little memory)" in notes
    assert "cannot square 5" in notes
    assert [piece for piece in range(8) if not plan.is_done(piece)] == [2, 5]
    assert [plan.computed().count(piece) for piece in (2, 4, 5)] == [2, 2, 2]


@pytest.mark.slow
def test_what_only_a_person_can_fix_ends_the_work_at_once(on_ray, tmp_path):
    notes = start(Toy(tmp_path, count=6, refuse=(0,), seconds=0.3), on_ray).communicate()[1]
    assert "DataError: example e0 is not a number" in notes


@pytest.mark.slow
def test_the_workers_of_a_killed_driver_end_and_the_next_one_goes_on(on_ray, tmp_path):
    plan = Toy(tmp_path, count=12, seconds=0.6, steps=6)
    job = JobFolder.of(tmp_path, plan.name)
    with start(plan, on_ray) as driver:
        wait_for(lambda: any(map(plan.is_done, range(12))) and at_work(job))
        driver.kill()
    wait_for(lambda: not at_work(job))
    begun = len(plan.computed())
    assert begun < 12
    assert start(plan, on_ray).communicate()[0].strip() == plan.expected()
    assert len(plan.computed()) <= 12 + 2


@pytest.mark.slow
def test_two_drivers_at_once_do_no_harm(on_ray, tmp_path):
    plan = Toy(tmp_path, count=16, seconds=0.2)
    drivers = [start(plan, on_ray, workers=1) for _ in "ab"]
    assert [driver.communicate()[0].strip() for driver in drivers] == [plan.expected()] * 2
    assert set(plan.computed()) == set(range(16))


@pytest.mark.slow
def test_status_and_cancel(on_ray, tmp_path):
    plan = Toy(tmp_path, count=10, seconds=20, steps=200)
    job = JobFolder.of(tmp_path, plan.name)
    with start(plan, on_ray) as driver:
        wait_for(lambda: len(at_work(job)) == 2)
        (status,) = job_statuses(tmp_path)
        assert (status.state, status.running) == ("running", (0, 1))
        assert any(f"process {driver.pid} ends" in line for line in cancel_jobs(tmp_path))
        assert "Run the same command again" in driver.communicate()[1]
        assert driver.returncode == 128 + signal.SIGTERM
    assert at_work(job) == []
    assert job_statuses(tmp_path)[0].state == "cancelled"
    wait_for(lambda: not actors(on_ray))


@pytest.mark.slow
def test_more_workers_than_places_are_done_one_after_another(on_ray, tmp_path):
    plan = Toy(tmp_path, count=8, seconds=0.1)
    assert start(plan, on_ray, workers=4).communicate()[0].strip() == plan.expected()
    assert sorted(plan.computed()) == list(range(8))


@pytest.mark.slow
def test_a_worker_that_no_node_has_a_place_for_is_named_and_the_wait_can_be_ended(on_ray, tmp_path):
    with start(Toy(tmp_path), on_ray, gpus_per_worker=1) as driver:
        line = driver.stderr.readline()
        while "no node of the Ray cluster has 1 CPUs (--threads) and 1 GPUs (--gpus-per-worker)" not in line:
            assert line, "the driver ended"
            line = driver.stderr.readline()
        driver.terminate()
        assert driver.wait(30) == 128 + signal.SIGTERM


@pytest.mark.slow
def test_a_node_that_does_not_see_the_folder_is_an_instruction(on_ray, tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    plan = Toy(tmp_path / "out", count=4)
    chosen = LaunchSettings(engine="ray", workers=2, address=on_ray.address)
    words = plan.command(chosen)
    removed = f"import os, runpy, sys; sys.argv = {words[2:]!r}; os.chdir({str(tmp_path / 'gone')!r}); "
    removed += f"os.rmdir({str(tmp_path / 'gone')!r}); os.getcwd = lambda: {str(tmp_path / 'gone')!r}; "
    removed += f"sys.path.insert(0, {os.getcwd()!r}); runpy.run_module('tests.jobs.toy', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", removed], capture_output=True, text=True, timeout=120, check=False)
    assert "Every node must see this folder and that of the result at the same paths" in done.stderr


@pytest.mark.slow
def test_without_a_cluster_ray_is_started_here_and_stopped_at_the_end(own_ray, tmp_path):
    plan = Toy(tmp_path, count=4)
    driver = start(plan, own_ray, address=None, workers=1)
    assert driver.communicate()[0].strip() == plan.expected()
    wait_for(lambda: not own_ray.processes("head"))


@pytest.mark.parametrize("address", ["127.0.0.1:1", "no-such-host.invalid:6379", "127.0.0.1:port", "127.0.0.1:99999"])
def test_an_address_where_nothing_answers_is_an_instruction(tmp_path, address):
    pytest.importorskip("ray")
    with pytest.raises(UserError, match=rf"was found at {address} \(--address\): [\s\S]*`ray start --head`"):
        Toy(tmp_path).run(engine="ray", address=address)


def test_a_client_address_is_refused(tmp_path):
    pytest.importorskip("ray")
    with pytest.raises(UserError, match="ray job submit --address ray://head:10001 -- vestige"):
        Toy(tmp_path).run(engine="ray", address="ray://head:10001")


def test_one_and_a_half_gpus_are_refused(tmp_path):
    with pytest.raises(SpecError, match=r"was 1\.5, expected a whole number"):
        LaunchSettings(engine="ray", gpus_per_worker=1.5)


def test_without_ray_the_command_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"pip install 'vestige\[ray\]'"):
        Toy(tmp_path).run(engine="ray")
    furnish(tmp_path)
    words = ["index", "--model", str(tmp_path / "tiny-model"), "--data", str(tmp_path / "train.jsonl")]
    with pytest.raises(SystemExit) as caught:
        main([*words, "--out", str(tmp_path / "idx"), "--engine", "ray"])
    assert caught.value.code == 2
    assert "pip install 'vestige[ray]'" in capsys.readouterr().err


def at_work(job):
    """The living workers that have begun a piece."""
    held = [each.worker for each in job.journals() if each.at_work is not None]
    return [worker for worker in held if is_alive(worker)]


def actors(cluster):
    return [*cluster.processes("head", "ray::RayActor"), *cluster.processes("node", "ray::RayActor")]


def wait_for(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
