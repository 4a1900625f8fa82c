"""Workers on a disk that is full or read-only: one clear error, and the same command goes on when it is mended."""

import errno
import os
import subprocess
import sys
import time

import pytest
from safetensors import SafetensorError

from tests.indexes.synthetic import hashes
from tests.jobs.disks import fill, remount, small_disk
from tests.jobs.toy import Toy
from tests.workshop import furnish, write_rows
from vestige.errors import DiskSpaceError, PieceFailed, UserError
from vestige.jobs import JobFolder


@pytest.mark.slow
def test_a_disk_so_full_that_not_even_the_failure_can_be_noted_is_one_clear_error(tmp_path, monkeypatch):
    with small_disk(tmp_path / "disk", 1) as disk:
        plan = Toy(disk / "out", count=4, seconds=0.1)
        made, start = [], subprocess.Popen

        def started_on_a_full_disk(*words, **options):
            if not made:
                made.append(fill(disk, 0))
            return start(*words, **options)

        with monkeypatch.context() as patch:
            patch.setattr(subprocess, "Popen", started_on_a_full_disk)
            with pytest.raises(DiskSpaceError, match=r"is full: .* Free disk space\. Finished shards are intact"):
                plan.run(workers=2)
        remount(disk, "size=2m")
        assert plan.run(workers=2) == plan.expected()


def test_a_read_only_folder_is_refused_before_a_worker_starts(tmp_path):
    with small_disk(tmp_path / "disk", 1) as disk:
        plan = Toy(disk / "out", count=4)
        plan.run(workers=1)
        (disk / "out" / "00002.json").unlink()
        remount(disk, "ro")
        with pytest.raises(UserError, match=r"cannot be written to \(Read-only file system\)\. Choose another --out"):
            plan.run(workers=2)
        remount(disk, "rw")
        assert plan.run(workers=2) == plan.expected()


@pytest.mark.parametrize(
    "error",
    [
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EFBIG, "File too large"),
    ],
)
def test_what_a_library_says_of_a_full_disk_ends_the_work_at_the_first_attempt(tmp_path, monkeypatch, error):
    def full(_):
        raise error

    monkeypatch.setattr(Toy, "_misbehave", lambda _, piece: full(piece))
    plan = Toy(tmp_path / "out", count=4)
    with pytest.raises(DiskSpaceError, match="Free disk space"):
        plan.run(workers=1, retries=5)
    assert plan.computed() == [0]


def test_attempts_are_counted_where_they_cannot_be_noted(tmp_path, monkeypatch):
    monkeypatch.setattr(JobFolder, "failure", lambda *_: None)
    monkeypatch.setattr(JobFolder, "failures", lambda _: [])
    plan = Toy(tmp_path / "out", count=3, fail=(1,))
    with pytest.raises(PieceFailed, match=r"piece 1, 3 times"):
        plan.run(workers=1, retries=2)
    assert plan.computed().count(1) == 3


@pytest.mark.slow
def test_an_index_whose_disk_fills_up_under_its_workers_goes_on_where_it_was(tmp_path):
    furnish(tmp_path)
    rows = [{"id": f"e{n}", "prompt": f"What is {n}?", "completion": f"{n} is {n % 7}."} for n in range(400)]
    write_rows(tmp_path / "train.jsonl", rows)
    command = [sys.executable, "-m", "vestige.cli", "index", "--model", str(tmp_path / "tiny-model"), "--data"]
    command += [str(tmp_path / "train.jsonl"), "--compress", "tensorsketch:64", "--out"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with small_disk(tmp_path / "disk", 24) as disk:
        out = disk / "idx"
        many = [*command, str(out), "--workers", "2"]
        with subprocess.Popen(many, env=environment, stderr=subprocess.PIPE, text=True) as driver:
            while driver.poll() is None and not list(out.glob("launch/indexing/logs/*")):
                time.sleep(0.02)
            fill(disk, 250_000)
            _, said = driver.communicate(timeout=120)
        assert driver.returncode != 0
        assert said.count("The disk (or the quota) is full") == 1
        assert "Traceback" not in said
        finished = len(list(out.glob("shards/*.json")))
        assert not list(out.rglob("*.tmp.*"))
        remount(disk, "size=64m")
        subprocess.run(many, env=environment, check=True, capture_output=True)
        assert 0 < finished < len(list(out.glob("shards/*.json")))
        subprocess.run([*command, str(tmp_path / "one")], env=environment, check=True, capture_output=True)
        assert hashes(out) == hashes(tmp_path / "one")
