import errno
import os
import socket
import subprocess
import sys
import tempfile
import time

import psutil
import pytest
from safetensors import SafetensorError

from vestige import files
from vestige.errors import DiskSpaceError, UserError
from vestige.files import (
    check_disk,
    disk_error,
    make_folder,
    open_temporary,
    remove_strays,
    remove_strays_of,
    remove_tree,
    sha256_of,
    temporary_path,
    this_host,
    write_durably,
)


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
        f"00004.json.tmp.{host}.{os.getpid()}.{files._ATTEMPT}.0",
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
