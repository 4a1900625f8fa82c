"""Arrays on the disk: numbers stay, memory does not."""

import tempfile
from pathlib import Path

import numpy as np
import pytest

from vestige import disk_arrays
from vestige.errors import DiskSpaceError, UserError
from vestige.scratch import Scratch


def mapped_bytes() -> int:
    """Memory of this process that is pages of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith("Rss")}
    return 1024 * (found["RssFile"] + found["RssShmem"])


def test_a_large_array_takes_memory_only_while_it_is_looked_at() -> None:
    before = mapped_bytes()
    array = disk_arrays.zeros((2, 4_000_000), np.int32)
    array[:] = np.arange(8_000_000).reshape(2, -1)
    assert mapped_bytes() > before + 30e6
    disk_arrays.let_go(array[1, 5:10])
    assert mapped_bytes() < before + 1e6
    assert np.array_equal(array[1], np.arange(4_000_000, 8_000_000))


def test_a_large_array_begins_with_zeros_and_outlives_its_parts() -> None:
    part = disk_arrays.zeros(1_000_000, np.float32)[10:20]
    assert not part.any()
    part[3] = 1.5
    disk_arrays.let_go(part)
    assert part.tolist() == [0, 0, 0, 1.5, 0, 0, 0, 0, 0, 0]


def test_letting_go_of_arrays_in_memory_changes_nothing() -> None:
    small, other = disk_arrays.zeros(5, np.int8), np.arange(3)
    small[2] = 7
    disk_arrays.let_go(small, other)
    assert small.tolist() == [0, 0, 7, 0, 0]
    assert other.tolist() == [0, 1, 2]


def test_no_file_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    array = disk_arrays.zeros(1_000_000, np.int64)
    assert not list(tmp_path.iterdir())
    assert array.sum() == 0


def test_an_array_that_does_not_fit_on_the_disk_says_where_to_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(DiskSpaceError, match="TMPDIR"):
        disk_arrays.zeros(1_000_000, np.int64)


def test_a_folder_for_temporary_files_that_cannot_be_used_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    with pytest.raises(UserError, match=r"absent.*TMPDIR"):
        disk_arrays.zeros(1_000_000, np.int64)


def test_no_folder_for_temporary_files_at_all_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    with pytest.raises(UserError, match="TMPDIR"):
        disk_arrays.zeros(1_000_000, np.int64)
    with pytest.raises(UserError, match="TMPDIR"):
        Scratch.temporary(100)
