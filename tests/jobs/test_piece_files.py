import errno
import json
import os

import pytest
import torch

from vestige.errors import CorruptFile, DiskSpaceError
from vestige.jobs import PieceFiles


@pytest.fixture
def files(tmp_path):
    made = PieceFiles(tmp_path / "pieces", "settings")
    made.write(0, {"scores": torch.arange(6.0)})
    made.write(2, {"scores": torch.ones(3)})
    return made


def test_a_piece_comes_back_as_it_was_written(files):
    assert torch.equal(files.read(0)["scores"], torch.arange(6.0))
    assert [files.is_done(piece) for piece in range(3)] == [True, False, True]


def test_a_piece_of_other_settings_does_not_count(files):
    other = PieceFiles(files.folder, "other settings")
    assert not other.is_done(0)
    with pytest.raises(CorruptFile, match="Run the same command again"):
        other.read(0)


def tensors_cut(files):
    files.path(0).write_bytes(files.path(0).read_bytes()[:-1])


def tensors_gone(files):
    files.path(0).unlink()


def marker_torn(files):
    marker = files.path(0).with_suffix(".json")
    marker.write_bytes(marker.read_bytes()[:9])


def marker_of_something_else(files):
    files.path(0).with_suffix(".json").write_text(json.dumps({"piece": 0}))


def marker_too_deep(files):
    files.path(0).with_suffix(".json").write_text("[" * 100_000 + "]" * 100_000)


def marker_of_other_types(files):
    marker = files.path(0).with_suffix(".json")
    marker.write_text(json.dumps(json.loads(marker.read_bytes()) | {"sha256": True}))


@pytest.mark.parametrize(
    "damage",
    [tensors_cut, tensors_gone, marker_torn, marker_of_something_else, marker_too_deep, marker_of_other_types],
)
def test_what_is_not_whole_is_not_done(files, damage):
    damage(files)
    assert not files.is_done(0)
    with pytest.raises(CorruptFile):
        files.read(0)


def test_a_flipped_bit_is_found_and_the_piece_forgotten(files):
    body = bytearray(files.path(0).read_bytes())
    body[-1] ^= 1
    files.path(0).write_bytes(body)
    with pytest.raises(CorruptFile):
        files.read(0)
    assert files.forget_damaged(range(3)) == [0]
    assert [files.is_done(piece) for piece in range(3)] == [False, False, True]


def test_a_write_that_fails_leaves_no_marker_that_vouches_for_the_old_file(files, monkeypatch):
    flushed = []

    def full(number):
        flushed.append(number)
        # The folder, from which the old marker was removed; then the file.
        if len(flushed) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskSpaceError):
        files.write(0, {"scores": torch.zeros(6)})
    assert not files.is_done(0)
