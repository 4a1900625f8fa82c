import errno
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from safetensors import SafetensorError

from vestige.errors import Difference, DiskSpaceError, IndexMismatch, UserError, differences, mismatch_message
from vestige.storage import (
    check_disk,
    disk_error,
    find_replaced_result,
    hold_folder,
    make_folder,
    open_temporary,
    remove_result,
    remove_strays,
    remove_strays_of,
    remove_tree,
    require_no_others,
    sha256_of,
    stage_folder,
    temporary_path,
    this_host,
    write_durably,
)

PROCESSES = multiprocessing.get_context("spawn")
"""Not forked: a child would take the folders that this process holds for its own."""

OURS = ("run.json", "part-*", "tokens")


def test_a_file_is_written_whole_with_its_size_and_hash(tmp_path):
    written = write_durably(tmp_path / "a", [b"one", memoryview(b"two")])
    assert (tmp_path / "a").read_bytes() == b"onetwo"
    assert written == (6, sha256_of(tmp_path / "a"))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_exclusive_writing_leaves_the_first_file(tmp_path):
    write_durably(tmp_path / "a", [b"first"], exclusive=True)
    with pytest.raises(FileExistsError):
        write_durably(tmp_path / "a", [b"second"], exclusive=True)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"first"]


def test_exclusive_writing_works_without_hard_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    write_durably(tmp_path / "a", [b"first"], exclusive=True)
    with pytest.raises(FileExistsError):
        write_durably(tmp_path / "a", [b"second"], exclusive=True)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"first"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_write_keeps_the_old_file_and_no_other(tmp_path, monkeypatch, failing):
    write_durably(tmp_path / "a", [b"old"])

    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(DiskSpaceError, match="run the same command again"):
        write_durably(tmp_path / "a", [b"new"])
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_an_interrupted_write_leaves_nothing(tmp_path):
    def interrupted():
        yield b"half"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_durably(tmp_path / "a", interrupted())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_under_a_file_is_the_callers_mistake(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file, expected a folder"):
        make_folder(tmp_path / "file" / "inner")


def test_check_disk_names_what_is_needed_and_what_is_free(tmp_path):
    check_disk(tmp_path / "not" / "yet", 1000)
    with pytest.raises(DiskSpaceError, match=r"needs 1\.0 PB more, and its disk has .* free"):
        check_disk(tmp_path / "not" / "yet", 10**15)
    assert list(tmp_path.iterdir()) == []


def test_strays_of_the_dead_go_and_those_of_the_living_stay(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = this_host()
    gone = [
        f"00001.json.tmp.{host}.{dead.pid}.00ff.3",
        # Our own process number, but the mark of another attempt: its process is dead, the number was given out again.
        f"00001.json.tmp.{host}.{os.getpid()}.00ff.3",
        "00002.json.tmp.elsewhere-1.1.00ff.0",
    ]
    kept = [
        f"00003.json.tmp.{host}.{os.getppid()}.00ff.0",
        temporary_path(tmp_path / "00004.json").name,
        "00005.json.tmp.elsewhere-1.1.00ff.0",
        "00006.json",
        "notes.tmp.txt",
    ]
    for name in (*gone, *kept):
        (tmp_path / name).touch()
    long_ago = time.time() - 2 * 24 * 3600
    os.utime(tmp_path / gone[2], (long_ago, long_ago))
    assert sorted(path.name for path in remove_strays(tmp_path)) == sorted(gone)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


def test_the_stray_of_a_zombie_in_an_inner_folder_goes(tmp_path):
    # Killed, and its parent has not looked yet: some parents never do.
    dead = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    dead.kill()
    while psutil.Process(dead.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    stray = tmp_path / "shards" / f"00001.json.tmp.{this_host()}.{dead.pid}.00ff.3"
    stray.parent.mkdir()
    stray.touch()
    assert remove_strays(tmp_path) == [stray]
    dead.wait()


def test_a_host_name_with_dots_still_makes_a_name_that_is_recognised(tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "node-7.cluster.example")
    (tmp_path / f"00001.json.tmp.{this_host()}.{os.getpid()}.00ff.3").touch()
    assert len(remove_strays(tmp_path)) == 1


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EFBIG, "File too large"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        SafetensorError("Error while serializing: I/O error: File too large (os error 27)"),
        RuntimeError("[enforce fail at inline_container.cc:668] . PytorchStreamWriter failed writing file data/0"),
    ],
)
def test_a_full_disk_is_known_whoever_says_it(tmp_path, error):
    assert "full" in str(disk_error(error, tmp_path))
    wrapped = RuntimeError("could not save")
    wrapped.__cause__ = error
    assert isinstance(disk_error(wrapped, tmp_path), DiskSpaceError)


def test_other_errors_are_no_full_disk(tmp_path):
    for error in (OSError(errno.EACCES, "Permission denied"), ValueError("x"), UserError("No space left on device")):
        assert disk_error(error, tmp_path) is None


def test_a_folder_that_a_dead_writer_left_goes_and_a_link_goes_alone(tmp_path):
    target = tmp_path / "mine"
    target.mkdir()
    (target / "precious").write_text("")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    stray = tmp_path / f".run.tmp.{this_host()}.{dead.pid}.abcdef12.0"
    stray.mkdir()
    (stray / "link").symlink_to(target)
    own = temporary_path(tmp_path / ".run")
    own.mkdir()
    assert remove_strays_of(tmp_path / ".run") == [stray]
    assert own.is_dir()
    remove_tree(own)
    link = tmp_path / "link"
    link.symlink_to(target)
    remove_tree(link)
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "precious"]


def test_a_folder_that_was_deleted_under_a_command_is_named(tmp_path):
    with pytest.raises(UserError, match="was removed or renamed while it was being written to"):
        write_durably(tmp_path / "gone" / "a", [b"x"])


def test_a_folder_of_others_is_neither_written_into_nor_removed(tmp_path):
    require_no_others(tmp_path / "new", OURS)
    for name in ("run.json", "part-1", "run.json.tmp.host.1.abc.1"):
        (tmp_path / name).write_text("")
    require_no_others(tmp_path, OURS)
    (tmp_path / "thesis.txt").write_text("mine")
    (tmp_path / "apart-1").write_text("mine")
    for asked in (lambda: require_no_others(tmp_path, OURS), lambda: remove_result(tmp_path, OURS, "run.json")):
        with pytest.raises(UserError, match=r"other files \(apart-1, thesis\.txt\)"):
            asked()
    assert (tmp_path / "run.json").exists()
    with pytest.raises(UserError, match="is a file"):
        require_no_others(tmp_path / "thesis.txt", OURS)


def test_a_result_is_removed_but_for_what_stays(tmp_path):
    folder = tmp_path / "result"
    (folder / "tokens").mkdir(parents=True)
    (folder / "part-1").mkdir()
    (folder / "run.json").write_text("")
    remove_result(folder, OURS, "run.json", keep=["tokens"])
    assert [path.name for path in folder.iterdir()] == ["tokens"]
    remove_result(tmp_path / "absent", OURS, "run.json")


def test_what_lies_deep_in_a_result_and_a_link_keep_it_from_being_removed(tmp_path):
    ours = ("run.json", "shards/[0-9]*.json")
    folder, elsewhere = tmp_path / "result", tmp_path / "elsewhere"
    (folder / "shards").mkdir(parents=True)
    elsewhere.mkdir()
    (elsewhere / "precious.txt").write_text("mine")
    (folder / "run.json").write_text("")
    (folder / "shards" / "00000.json").write_text("")
    (folder / "shards" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"other files \(shards/notes.txt\)"):
        remove_result(folder, ours, "run.json")
    (folder / "shards" / "notes.txt").unlink()
    (folder / "shards" / "00001.json").symlink_to(elsewhere / "precious.txt")
    with pytest.raises(UserError, match="is a symbolic link, which Vestige did not make; nothing was changed"):
        remove_result(folder, ours, "run.json")
    assert (folder / "run.json").exists()
    (folder / "shards" / "00001.json").unlink()
    remove_result(folder, ours, "run.json")
    assert list(folder.iterdir()) == []
    assert (elsewhere / "precious.txt").read_text() == "mine"


def test_without_a_record_the_names_of_a_result_are_anyones(tmp_path):
    (tmp_path / "part-1").write_text("mine")
    with pytest.raises(UserError, match=r"other files \(part-1\)"):
        remove_result(tmp_path, OURS, "run.json")
    assert (tmp_path / "part-1").read_text() == "mine"


def _hold(folder, command, shared, seconds, began):
    with hold_folder(folder, command, shared=shared):
        began.set()
        time.sleep(seconds)


def _held_elsewhere(folder, command, shared=None, seconds=60.0):
    began = PROCESSES.Event()
    child = PROCESSES.Process(target=_hold, args=(folder, command, shared, seconds, began))
    child.start()
    assert began.wait(20)
    return child


@pytest.mark.slow
def test_of_two_commands_on_one_folder_the_second_is_refused_until_the_first_ends_or_is_killed(tmp_path):
    folder = tmp_path / "run"
    first = _held_elsewhere(folder, "vestige attribute --out run")
    with (
        pytest.raises(UserError, match=rf"process {first.pid} on .*:\n  vestige attribute --out run\nWait until"),
        hold_folder(folder, "vestige audit --out run"),
    ):
        pytest.fail("both hold it")
    assert (tmp_path / ".run.lock").exists()
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    with hold_folder(folder, "vestige audit --out run"):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_commands_with_the_same_settings_share_a_folder_and_others_do_not(tmp_path):
    folder = tmp_path / "idx"
    first = _held_elsewhere(folder, "vestige index", shared="a", seconds=2)
    with hold_folder(folder, "vestige index", shared="a"):
        with pytest.raises(UserError, match="is being written by another command"):
            _refused_in_child(folder, "b")
        first.join()
        with pytest.raises(UserError, match="is being written by another command"):
            _refused_in_child(folder, None)
    assert list(tmp_path.iterdir()) == []


def _refused_in_child(folder, shared):
    read, write = PROCESSES.Pipe()
    child = PROCESSES.Process(target=_report_hold, args=(folder, shared, write))
    child.start()
    said = read.recv()
    child.join()
    if said:
        raise UserError(said)


def _report_hold(folder, shared, write):
    try:
        with hold_folder(folder, "other", shared=shared):
            write.send("")
    except UserError as error:
        write.send(str(error))


def test_a_folder_inside_one_that_is_held_is_held(tmp_path):
    with hold_folder(tmp_path / "out", "outer"), hold_folder(tmp_path / "out" / "runs" / "a", "inner"):
        assert [path.name for path in tmp_path.rglob("*")] == [".out.lock"]


def test_a_refused_command_leaves_no_folder(tmp_path):
    out = tmp_path / "a" / "b" / "out"
    with pytest.raises(UserError, match="no"), hold_folder(out, "command"):
        _begin_and_refuse(out)
    assert list(tmp_path.iterdir()) == []


def write_text(folder, name, text):
    folder.mkdir()
    (folder / name).write_text(text)


def _begin_and_refuse(out):
    (out / "runs").mkdir(parents=True)
    raise UserError("no")


def _replace_and_die(folder, step):
    renames, rename, replace = 0, Path.rename, Path.replace

    def counted(call):
        def wrapped(self, target):
            nonlocal renames
            renames += 1
            if renames == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(self, target)

        return wrapped

    Path.rename, Path.replace = counted(rename), counted(replace)
    with hold_folder(folder, "command"), stage_folder(folder, replace=True) as new:
        (new / "run.json").write_text("new")


@pytest.mark.parametrize("step", [1, 2])
def test_a_result_whose_replacement_was_killed_comes_back_and_nothing_is_left(tmp_path, step):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text("old")
    child = PROCESSES.Process(target=_replace_and_die, args=(folder, step))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert (find_replaced_result(folder) is not None) == (step == 2)
    with hold_folder(folder, "the next command"):
        assert (folder / "run.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_result_that_appeared_meanwhile_is_not_replaced(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(IndexMismatch, match="by another command during this one"), stage_folder(folder):
        write_text(folder, "run.json", "first")
    assert (folder / "run.json").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_every_difference_is_shown_in_columns():
    old = {"data": "0123456789", "batch_size": 4, "lora_rank": None, "gone": True}
    new = {"data": "abcdefghij", "batch_size": 4, "lora_rank": 8, "checkpoints": [0, 1]}
    found = differences(old, new, {"data": "a.jsonl"}, {"data": "b.jsonl"})
    assert found == [
        Difference("data", "a.jsonl (01234567)", "b.jsonl (abcdefgh)"),
        Difference("lora-rank", "none", "8"),
        Difference("gone", "yes", "none"),
        Difference("checkpoints", "none", "0 1"),
    ]
    lines = mismatch_message("The bank in x", found).splitlines()
    assert lines[0] == "The bank in x was made with other settings; nothing was changed."
    assert len({line.index(shown) for line, shown in zip(lines[1:3], ("on disk", "a.jsonl"), strict=True)}) == 1


def test_a_temporary_file_has_no_name_and_its_reserved_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with open_temporary(1000) as file:
        assert file.read() == bytes(1000)
        assert not list(tmp_path.iterdir())


def test_a_temporary_file_that_does_not_fit_says_where_to_make_room(monkeypatch):
    def full(descriptor, offset, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(DiskSpaceError, match=r"8\.0 MB do not fit.*TMPDIR"):
        open_temporary(8_000_000)


def test_a_folder_for_temporary_files_that_cannot_be_used_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    with pytest.raises(UserError, match=r"absent.*TMPDIR"):
        open_temporary()


def test_no_folder_for_temporary_files_at_all_is_a_clear_error(monkeypatch):
    def nowhere():
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_get_default_tempdir", nowhere)
    with pytest.raises(UserError, match="TMPDIR"):
        open_temporary()
