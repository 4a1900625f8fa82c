"""Death at any moment: whoever continues ends with the same bytes, and repeats only the shards that were in flight."""

import errno
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.indexes.synthetic import build, build_slowly, compute, hashes, planned, work_of
from vestige.errors import DiskSpaceError, IndexMismatch, NonFinite, PieceFailed, SpecError, UserError
from vestige.indexes import Index, IndexedComponent, PlanRecord, index_status, marker_path, prepare_index, shard_path
from vestige.storage import this_host

EXAMPLES = 400
FINE = PlanRecord(fewest_shards=60)

# A server that has imported everything once: a child starts in milliseconds, from a process without threads.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["vestige.indexes", "pandas"])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "index"
    build(folder, EXAMPLES, plan=FINE)
    return hashes(folder)


def started(log):
    return [int(line) for line in log.read_text().split()] if log.exists() else []


@pytest.mark.slow
def test_ten_kills_change_no_byte_and_repeat_only_the_shards_in_flight(tmp_path, uninterrupted):
    folder, moments, runs = tmp_path / "index", random.Random(0), []
    for number in range(11):
        log = tmp_path / f"log{number}"
        child = PROCESSES.Process(target=build_slowly, args=(folder, log, 0.05, EXAMPLES, FINE))
        child.start()
        if number < 10:
            # In some shard, however slow the machine is; then sooner or later within it.
            shard = moments.randint(1, 3)
            wait_until(lambda log=log, shard=shard: len(started(log)) >= shard)
            time.sleep(moments.uniform(0, 0.05))
            os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert child.exitcode == (-signal.SIGKILL if number < 10 else 0)
        runs.append(started(log))
    assert sum(len(run) > 1 for run in runs[:-1]) > 2, "the kills came too early to show anything"
    assert hashes(folder) == uninterrupted
    assert Index.open(folder).verify() == []
    # One shard is being computed, and the one before it may be on its way to the disk.
    for earlier, later in pairwise(runs):
        assert not set(earlier[:-2]) & set(later)
    assert sum(map(len, runs)) <= len(Index.open(folder).manifest.shard_rows) + 20


def wait_until(ready, seconds=60.0):
    give_up = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < give_up, "the child did not start in time"
        time.sleep(0.001)


def build_and_die(folder, step, count):
    """Build, and die by SIGKILL just before the `step`-th change to a file or folder; write all steps to `count`."""
    seen = 0

    def watch(event, args):
        nonlocal seen
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        changes = event in ("os.rename", "os.link", "os.remove", "os.mkdir") or writes
        if changes and str(folder) in str(args[0]):
            if seen == step:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    sys.addaudithook(watch)
    build(folder, 6, token_budget=300)
    count.value = seen


@pytest.mark.slow
def test_death_before_any_single_change_on_disk_is_survived(tmp_path):
    build(tmp_path / "whole", 6)
    wanted, count = hashes(tmp_path / "whole"), PROCESSES.Value("i", 0)

    def die_at(step):
        folder = tmp_path / f"index{step}"
        child = PROCESSES.Process(target=build_and_die, args=(folder, step, count))
        child.start()
        child.join()
        return folder, child.exitcode

    assert die_at(-1)[1] == 0
    # Manifest, examples and two shards with two files each: opened, renamed or linked, and their temporary removed.
    assert count.value > 15
    for step in range(count.value):
        folder, status = die_at(step)
        assert status == -signal.SIGKILL
        build(folder, 6)
        assert hashes(folder) == wanted, f"killed before change {step}"


def damage_tensors(folder):
    shard_path(folder, 2).write_bytes(shard_path(folder, 2).read_bytes()[:-7])


def damage_byte(folder):
    body = bytearray(shard_path(folder, 2).read_bytes())
    body[-1] ^= 0x40
    shard_path(folder, 2).write_bytes(body)


def damage_marker(folder):
    marker_path(folder, 2).write_bytes(marker_path(folder, 2).read_bytes()[:20])


def remove_marker(folder):
    marker_path(folder, 2).unlink()


def remove_tensors(folder):
    shard_path(folder, 2).unlink()


@pytest.mark.parametrize(
    "damage", [damage_tensors, damage_byte, damage_marker, remove_marker, remove_tensors], ids=lambda one: one.__name__
)
def test_a_damaged_shard_alone_is_rebuilt(tmp_path, damage):
    build(tmp_path)
    before = hashes(tmp_path)
    damage(tmp_path)
    assert build(tmp_path) == [2]
    assert hashes(tmp_path) == before
    assert build(tmp_path) == []


def test_a_stray_temporary_file_of_a_dead_process_is_removed(tmp_path):
    build(tmp_path)
    before = hashes(tmp_path)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / "shards" / f"00002.safetensors.tmp.{this_host()}.{dead.pid}.0a0b.7").write_bytes(b"half")
    build(tmp_path)
    assert hashes(tmp_path) == before


def test_three_workers_make_the_bytes_that_one_makes(tmp_path):
    build(tmp_path / "one")
    done = [build(tmp_path / "three", shard=(worker, 3)) for worker in (2, 0, 1)]
    assert hashes(tmp_path / "three") == hashes(tmp_path / "one")
    total = len(Index.open(tmp_path / "one").manifest.shard_rows)
    assert done == [list(range(worker, total, 3)) for worker in (2, 0, 1)]


def test_more_workers_than_shards_leave_some_idle(tmp_path):
    build(tmp_path)
    before = hashes(tmp_path)
    assert build(tmp_path, shard=(98, 99)) == []
    assert hashes(tmp_path) == before


@pytest.mark.slow
def test_two_processes_at_once_do_not_harm_each_other(tmp_path, uninterrupted):
    folder = tmp_path / "both"
    children = [
        PROCESSES.Process(target=build_slowly, args=(folder, tmp_path / f"log{number}", 0.001, EXAMPLES, FINE))
        for number in range(2)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    assert hashes(folder) == uninterrupted


@pytest.mark.parametrize("shard", [(3, 3), (-1, 3), (0, 0)])
def test_a_share_that_is_none_is_refused(tmp_path, shard):
    with pytest.raises(SpecError, match="i/n with i from 1 to n"):
        build(tmp_path / "index", shard=shard)
    assert not (tmp_path / "index").exists()


def test_appended_data_leaves_every_old_shard_as_it_was(tmp_path):
    build(tmp_path)
    before = hashes(tmp_path)
    old = len(Index.open(tmp_path).manifest.shard_rows)
    assert min(build(tmp_path, 90, append=True)) == old
    after = hashes(tmp_path)
    assert {name: after[name] for name in before if name != "manifest.json"} == {
        name: digest for name, digest in before.items() if name != "manifest.json"
    }
    index = Index.open(tmp_path)
    assert index.rows == 90
    assert index.verify() == []
    # The same command again, and the command of the smaller data, find nothing to do and nothing they may change.
    assert build(tmp_path, 90) == []
    with pytest.raises(IndexMismatch, match="90 examples"):
        build(tmp_path, 60)
    assert hashes(tmp_path) == after


def test_an_append_that_is_cut_off_goes_on_without_being_asked_again(tmp_path):
    build(tmp_path / "whole")
    build(tmp_path / "whole", 90, append=True)
    build(tmp_path / "cut")
    build(tmp_path / "cut", 90, append=True, shard=(1, 2))
    build(tmp_path / "cut", 90)
    assert hashes(tmp_path / "cut") == hashes(tmp_path / "whole")


def test_interruption_leaves_finished_shards_and_says_how_to_go_on(tmp_path, capsys):
    done = []

    def interrupted(batches):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(batches)
        return compute(batches)

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, compute=interrupted)
    status = index_status(tmp_path)
    assert status.done == 3
    message = capsys.readouterr().err
    assert f"{status.total - 3} of {status.total} pieces missing. Run the same command again" in message
    assert not list(tmp_path.rglob("*.tmp.*"))
    assert min(build(tmp_path)) == 3


def test_a_shard_that_another_process_finishes_during_the_preparation_stays_done(tmp_path, monkeypatch):
    build(tmp_path)
    marker = tmp_path / "shards" / "00002.json"
    kept = marker.read_bytes()
    marker.unlink()
    work = work_of(tmp_path)
    usage = shutil.disk_usage

    def finish_meanwhile(path):
        marker.write_bytes(kept)
        return usage(path)

    monkeypatch.setattr("shutil.disk_usage", finish_meanwhile)
    assert prepare_index(work) == [2]
    assert work.pieces.is_done(2)


def test_a_bad_example_is_named_and_earlier_shards_stay(tmp_path):
    def poisoned(batches):
        (made,) = compute(batches)
        made.loss[made.example == 17] = float("nan")
        return [made]

    with pytest.raises(NonFinite, match=r'loss of 1 example is NaN or infinite: "e17" \(row 17\)'):
        build(tmp_path, compute=poisoned)
    assert 0 < index_status(tmp_path).done < index_status(tmp_path).total


def test_rows_other_than_planned_are_never_stored(tmp_path):
    def shuffled(batches):
        (made,) = compute(batches)
        return [made._replace(example=made.example.flip(0))]

    with pytest.raises(PieceFailed, match="other rows than planned"):
        build(tmp_path, compute=shuffled)
    assert index_status(tmp_path).done == 0


def test_a_folder_with_other_files_is_not_written_to(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"holds other files \(thesis.tex\)"):
        build(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_disk_without_room_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=17 * 2**20))
    with pytest.raises(DiskSpaceError, match=r"needs .* more"):
        build(tmp_path / "index", 60, shard=None, compute=never, components=_wide(2**17))
    assert not (tmp_path / "index").exists()


def never(batches):
    raise AssertionError("computed although there is no room")


def _wide(columns):
    return (IndexedComponent(name="w", kind="linear", shape=(columns, 1), start=0, stop=columns),)


@contextmanager
def small_disk(folder, kilobytes):
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up_keeps_what_is_finished(tmp_path, monkeypatch):
    build(tmp_path / "whole")
    with small_disk(tmp_path / "disk", 64) as mounted:
        # Ours alone would be refused before the start; here somebody else takes the room meanwhile.
        monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2**40))
        folder = tmp_path / "disk" / "index"
        with monkeypatch.context() as patch:
            if not mounted:
                fill_after(patch, 48)
            with pytest.raises(
                DiskSpaceError, match=r"is full: .* was removed\. Free disk space. Finished shards are intact"
            ):
                build(folder)
        status = index_status(folder)
        assert 0 < status.done < status.total
        assert not list(folder.rglob("*.tmp.*"))
        if mounted:
            subprocess.run(["mount", "-o", "remount,size=4m", str(tmp_path / "disk")], check=True)
        assert len(build(folder)) == status.total - status.done
        assert hashes(folder) == hashes(tmp_path / "whole")


def test_a_full_disk_is_understood_without_one(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        fill_after(patch, 48)
        with pytest.raises(DiskSpaceError, match="Finished shards are intact"):
            build(tmp_path / "index")
    status = index_status(tmp_path / "index")
    assert 0 < status.done < status.total
    assert len(build(tmp_path / "index")) == status.total - status.done


def fill_after(patch, syncs):
    """Every fsync after so many fails as it does on a full disk."""
    real, left = os.fsync, [syncs]

    def fsync(descriptor):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    patch.setattr(os, "fsync", fsync)


def shards_at_the_disk(patch, seen):
    """Call `seen` with the name of every shard whose bytes are about to be on the disk."""
    real = os.fsync

    def fsync(descriptor):
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        if ".safetensors.tmp." in name:
            seen(name.split(".")[0])
        real(descriptor)

    patch.setattr(os, "fsync", fsync)


def test_a_shard_goes_to_the_disk_while_the_next_one_is_computed(tmp_path, monkeypatch):
    begun, overlapped = threading.Event(), []

    def noted(batches):
        found = compute(batches)
        if overlapped:
            begun.set()
        overlapped.append(True)
        return found

    def seen(name):
        if name == "00000":
            assert begun.wait(20), "the second shard is computed only when the first is on the disk"

    shards_at_the_disk(monkeypatch, seen)
    assert len(build(tmp_path / "index", compute=noted)) == len(overlapped) > 2
    assert begun.is_set()


@pytest.mark.parametrize("failing", ["00000", "last"])
def test_a_disk_that_is_full_at_any_shard_ends_the_work_and_leaves_the_others(tmp_path, monkeypatch, failing):
    total = len(planned(tmp_path / "index")[1])
    name = f"{total - 1:05d}" if failing == "last" else failing

    def seen(shard):
        if shard == name:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        shards_at_the_disk(patch, seen)
        with pytest.raises(
            DiskSpaceError, match=rf"{name}\.safetensors stopped after(.|\n)*Finished shards are intact"
        ):
            build(tmp_path / "index")
    assert not list((tmp_path / "index").rglob("*.tmp.*"))
    assert int(name) in build(tmp_path / "index")
    build(tmp_path / "whole")
    assert hashes(tmp_path / "index") == hashes(tmp_path / "whole")


def test_a_folder_that_cannot_be_written_to_says_so(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    with pytest.raises(UserError, match=r"cannot be written to \(Read-only file system\)\. Choose another --out"):
        build(tmp_path / "index")
