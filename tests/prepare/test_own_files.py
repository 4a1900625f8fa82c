"""What lies in `--out` and was not made by the command is left alone; what a killed command left is continued."""

import contextlib
import json
import os

import pytest

from tests.workshop import PAIRS, write_rows
from vestige.errors import IndexMismatch, UserError
from vestige.prepare import split


@pytest.fixture
def data(tmp_path):
    rows = [{"id": f"r{n}", "prompt": prompt, "completion": answer} for n, (prompt, answer, _) in enumerate(PAIRS)]
    return write_rows(tmp_path / "train.jsonl", rows)


def listing(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("mine", ["train.jsonl", "data.jsonl", "flagged.jsonl", "dataset/precious.txt", "tokens/a"])
def test_files_of_the_user_are_neither_replaced_nor_deleted(data, tmp_path, mine, overwrite):
    out = tmp_path / "out"
    (out / mine).parent.mkdir(parents=True, exist_ok=True)
    (out / mine).write_text("mine")
    before = listing(out)
    with pytest.raises(UserError, match="holds other files"):
        split(data=data, out=out, overwrite=overwrite)
    assert listing(out) == before


def test_an_input_in_the_folder_of_the_output_is_refused(data, tmp_path):
    before = listing(tmp_path)
    with pytest.raises(UserError, match=r'data=".*train\.jsonl" lies in the folder of `out`'):
        split(data=data, out=tmp_path, parts={"train": 0.8, "test": 0.2})
    link = tmp_path / "link.jsonl"
    link.symlink_to(data)
    with pytest.raises(UserError, match="lies in the folder of `out`"):
        split(data=link, out=tmp_path, overwrite=True)
    link.unlink()
    assert listing(tmp_path) == before


def test_a_file_that_was_put_into_a_result_stays(data, tmp_path):
    out = tmp_path / "out"
    split(data=data, out=out)
    (out / "dataset" / "notes.txt").write_text("mine")
    before = listing(out)
    with pytest.raises(UserError, match=r"other files \(dataset/notes\.txt\)"):
        split(data=data, out=out, seed=3, overwrite=True)
    assert listing(out) == before


def test_parts_of_an_earlier_result_go_with_it(data, tmp_path):
    out = tmp_path / "out"
    split(data=data, out=out)
    with pytest.raises(IndexMismatch, match="holds a result of other settings"):
        split(data=data, out=out, parts={"a": 0.5, "b": 0.5})
    split(data=data, out=out, parts={"a": 0.5, "b": 0.5}, overwrite=True)
    assert {path.name for path in out.iterdir()} == {"prepare.json", "data.jsonl", "dataset", "a.jsonl", "b.jsonl"}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("step", range(1, 13))
def test_after_a_kill_at_any_file_the_same_command_goes_on(data, tmp_path, monkeypatch, step):
    split(data=data, out=tmp_path / "whole")
    done, fsync = 0, os.fsync

    def die(descriptor):
        nonlocal done
        done += 1
        if done == step:
            raise Killed
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", die)
        with contextlib.suppress(Killed):
            split(data=data, out=tmp_path / "out")
    assert done == step
    split(data=data, out=tmp_path / "out")
    found, wanted = listing(tmp_path / "out"), listing(tmp_path / "whole")
    records = [json.loads(each.pop("prepare.json")) for each in (found, wanted)]
    assert records[0]["rows"] == records[1]["rows"]
    assert found == wanted
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
