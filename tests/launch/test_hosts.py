"""Two hosts: the ranks of torchrun on both share an index, and a host that dies is not waited for for ever."""

import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from tests.indexes.synthetic import hashes
from tests.launch import hosts
from tests.launch.toy import ToyPlan
from tests.workshop import furnish, write_rows
from vestige.launch import JobFolder
from vestige.settings import LaunchSettings


@pytest.mark.slow
def test_two_hosts_under_torchrun_make_the_bytes_of_one_process(tmp_path):
    furnish(tmp_path)
    rows = [{"id": f"e{n}", "prompt": f"What is {n}?", "completion": f"{n} is {n % 7}."} for n in range(1500)]
    write_rows(tmp_path / "train.jsonl", rows)
    program = ["-m", "vestige.cli", "index", "--model", str(tmp_path / "tiny-model"), "--compress", "tensorsketch:16"]
    program += ["--data", str(tmp_path / "train.jsonl"), "--out"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *program, str(tmp_path / "one")], env=environment, check=True)
    expected, worked = hashes(tmp_path / "one"), set()
    with hosts.two_hosts(tmp_path) as both:
        # A host that starts late may find nothing left: the bytes are compared every time, until both had a part.
        for attempt in range(3):
            out = tmp_path / f"two-{attempt}"
            ranks = hosts.torchrun(both, [*program, str(out)])
            assert [rank.wait(180) for rank in ranks] == [0, 0]
            assert hashes(out) == expected
            worked = {entry.host.rsplit("-", 1)[0] for entry in JobFolder.of(out, "Indexing").journal()}
            if len(worked) == 2:
                break
        assert worked == {host.name for host in both}


@pytest.mark.slow
def test_the_piece_of_a_host_that_died_is_done_by_the_other_when_no_heartbeat_comes(tmp_path):
    plan = ToyPlan(tmp_path / "out", pieces=4)
    endless = replace(plan, seconds=600, steps=6000)
    soon = {"VESTIGE_STALE_SECONDS": "3"}
    with hosts.two_hosts(tmp_path) as (first, second):
        options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        dying = first.start(endless.command(LaunchSettings()), soon, **options)
        job = JobFolder.of(plan.folder, plan.name)
        # A claim is there before its piece begins: killed in between, the piece would be computed once, by the other.
        while not (plan.folder / "computed.log").exists() or not plan.computed():
            assert dying.poll() is None
            time.sleep(0.05)
        hosts.kill(dying)
        ((piece, owner),) = job.claims.owners().items()
        assert owner.worker.host.rsplit("-", 1)[0] == first.name
        started = time.monotonic()
        other = second.start(plan.command(LaunchSettings()), soon, **options)
        assert other.wait(60) == 0
    assert (plan.folder / "result.txt").read_text() == plan.expected()
    assert time.monotonic() - started > 3
    assert plan.computed().count(int(piece)) == 2
