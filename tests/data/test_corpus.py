"""A data set larger than what may be in memory is the same data, wherever it is made and however often it is killed."""

import gzip
import json
import os
import shutil
import signal
import tracemalloc

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from tests.data.conftest import Letters
from vestige.data import (
    Encoder,
    StoredExamples,
    forget_tokens,
    load_examples,
    make_batch,
    tokenize,
    tokenize_source,
)
from vestige.errors import DataError, UserError

TURNS = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]


def rows_of(count):
    for row in range(count):
        if row % 5 == 0:
            yield {"id": f"e{row}", "text": f"The sky is blue, number {row}. " * (row % 7 + 1), "source": "sky"}
        elif row % 5 == 1:
            yield {"prompt": f"Question {row}? ", "completion": "Paris.", "label": "capital", "note": row}
        elif row % 5 == 2:
            yield {"messages": TURNS, "source": "chat"}
        elif row % 5 == 3:
            yield {"input_ids": list(range(5, 5 + row % 9)), "source": "tokens"}
        else:
            yield {"text": ""}


def write(path, count=200):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_of(count)), encoding="utf-8")
    return path


SMALL = {"held_bytes": 0, "part_rows": 16}
"""Everything is larger than memory, and a part is 16 examples."""


def same(data, wanted):
    assert isinstance(data.examples, StoredExamples)
    assert data.fingerprint == wanted.fingerprint
    np.testing.assert_array_equal(data.lengths, wanted.lengths)
    np.testing.assert_array_equal(data.target_counts, wanted.target_counts)
    np.testing.assert_array_equal(data.truncated, wanted.truncated)
    for row, (ids, mask) in enumerate(zip(wanted.input_ids, wanted.targets, strict=True)):
        np.testing.assert_array_equal(data.input_ids[row], ids)
        np.testing.assert_array_equal(data.targets[row], mask)
        assert data.input_ids[row].dtype == np.int32
        assert data.targets[row].dtype == bool
    for one, other in zip(data.examples, wanted.examples, strict=True):
        assert (one.id, one.row, one.display, one.source, one.label) == (
            (other.id, other.row, other.display, other.source, other.label)
        )
        assert list(one.extra) == list(other.extra)
    for one, other in zip(make_batch(data, [7, 3, 150]), make_batch(wanted, [7, 3, 150]), strict=True):
        assert (one is None and other is None) or (one == other).all()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("max_length", [None, 6])
def test_on_disk_is_what_is_in_memory(tmp_path, chatml, max_length, capsys):
    path = write(tmp_path / "train.jsonl")
    wanted = tokenize(load_examples(path), chatml, max_length=max_length, chat=True)
    said = capsys.readouterr().err
    options = {"max_length": max_length, "name": "data", "chat": True, "folder": tmp_path / "tokens"}
    data = tokenize_source(path, chatml, **options, **SMALL)
    same(data, wanted)
    assert capsys.readouterr().err.splitlines()[1:] == said.splitlines()
    same(tokenize_source(path, chatml, **options, **SMALL), wanted)


@pytest.mark.parametrize("held", [0, 30_000, 60_000, 300_000])
def test_whatever_was_in_memory_before_the_disk_was_needed_is_there(tmp_path, chatml, held):
    options = {"folder": tmp_path / "tokens", "held_bytes": held, "part_rows": 16}
    path = write(tmp_path / "train.jsonl")
    wanted = tokenize(load_examples(path), chatml, max_length=None, chat=True)
    same(tokenize_source(path, chatml, max_length=None, name="data", chat=True, **options), wanted)


def test_small_data_stays_in_memory_and_leaves_no_files(tmp_path, chatml):
    path = write(tmp_path / "train.jsonl")
    data = tokenize_source(path, chatml, max_length=None, name="data", folder=tmp_path / "tokens", workers=4)
    assert data.fingerprint == tokenize(load_examples(path), chatml, max_length=None).fingerprint
    assert isinstance(data.examples, list)
    assert not (tmp_path / "tokens").exists()


@pytest.mark.slow
def test_processes_write_the_same_bytes(tmp_path, chatml):
    path = write(tmp_path / "train.jsonl")
    for workers in (1, 2):
        folder = tmp_path / f"by-{workers}"
        tokenize_source(path, chatml, max_length=20, name="data", folder=folder, workers=workers, **SMALL)
    assert contents(tmp_path / "by-1") == contents(tmp_path / "by-2")
    assert not [child for child in psutil.Process().children() if "popen_loky" in " ".join(child.cmdline())]
    assert len(list((tmp_path / "by-1").rglob("*.arrow"))) == 13


@pytest.mark.parametrize("kind", ["gz", "parquet", "dataset", "list"])
def test_every_source_streams(tmp_path, chatml, kind):
    rows = [{"id": f"e{row}", "text": f"Hello {row}", "source": None} for row in range(200)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    source = rows
    if kind == "gz":
        source = tmp_path / "train.jsonl.gz"
        source.write_bytes(gzip.compress(lines.encode()))
    elif kind == "parquet":
        source = tmp_path / "train.parquet"
        parquet.write_table(pa.Table.from_pylist(rows), source, row_group_size=30)
    elif kind == "dataset":
        import datasets

        source = datasets.Dataset.from_list(rows)
    data = tokenize_source(source, chatml, max_length=None, name="data", folder=tmp_path / "tokens", **SMALL)
    same(data, tokenize(load_examples(rows), chatml, max_length=None))
    # A list in memory has nothing by which to know it again.
    assert (tmp_path / "tokens").exists() == (kind != "list")


def test_temporary_tokens_go_with_the_data(tmp_path, chatml):
    data = tokenize_source(write(tmp_path / "train.jsonl"), chatml, max_length=None, name="data", **SMALL)
    assert isinstance(data.examples, StoredExamples)
    folder = data.examples.folder
    assert len(list(folder.glob("*.arrow"))) == 13
    ids = data.input_ids
    del data
    assert len(ids[0])
    del ids
    assert not folder.exists()


def test_killed_and_continued_gives_the_same_bytes(tmp_path, chatml, monkeypatch):
    path = write(tmp_path / "train.jsonl")
    options = {"max_length": None, "name": "data"}
    tokenize_source(path, chatml, folder=tmp_path / "whole", **options, **SMALL)
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    folder = next((tmp_path / "killed").iterdir())
    (folder / "tokens.json").unlink()
    for name in ("00003.json", "00007.arrow", "00012.json", "00012.parquet"):
        (folder / name).unlink()
    with (folder / "00005.arrow").open("r+b") as file:
        file.write(b"\xff")
    made, encode = [], Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda self, rows: made.append(rows[0].row // 16) or encode(self, rows))
    same(
        tokenize_source(path, chatml, folder=tmp_path / "killed", **options, **SMALL),
        tokenize(load_examples(path), chatml, max_length=None),
    )
    assert made[:4] == [3, 5, 7, 12]
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_other_data_or_settings_have_tokens_of_their_own(tmp_path, chatml, with_beginning):
    path, folder = write(tmp_path / "train.jsonl"), tmp_path / "tokens"
    first = tokenize_source(path, chatml, max_length=None, name="data", folder=folder, **SMALL)
    assert tokenize_source(path, chatml, max_length=9, name="data", folder=folder, **SMALL).lengths.max() == 9
    assert len(tokenize_source(path, chatml, max_length=None, name="data", folder=folder, limit=50, **SMALL)) == 50
    assert len(list(folder.iterdir())) == 3
    write(path, 201)
    assert len(tokenize_source(path, chatml, max_length=None, name="data", folder=folder, **SMALL)) == 201
    assert len(list(folder.iterdir())) == 4
    forget_tokens(folder, first)
    assert len(list(folder.iterdir())) == 1
    assert first.input_ids[199].shape == (first.lengths[199],)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "broken', r"train\.jsonl, line 151: not valid JSON"),
        ('{"texts": "x"}', r"train\.jsonl, row 150 \(line 151\): its columns are `texts`"),
        ('{"id": "e5", "text": "x"}', r"train\.jsonl, row 150 \(line 151\): the id 'e5' is already that of row 5"),
        ('{"id": "149", "text": "x"}', r"row 150 \(line 151\): the id '149' is already that of row 149"),
    ],
)
def test_errors_name_the_file_and_the_line(tmp_path, chatml, line, message):
    path = write(tmp_path / "train.jsonl")
    lines = path.read_text().splitlines()
    lines[150] = line
    path.write_text("\n".join(lines))
    for folder in (tmp_path / "tokens", tmp_path / "tokens"):  # once more over what was left
        with pytest.raises(DataError, match=message):
            tokenize_source(path, chatml, max_length=None, name="data", folder=folder, **SMALL)


@pytest.mark.slow
def test_the_first_error_comes_out_of_many_processes(tmp_path, chatml):
    path = write(tmp_path / "train.jsonl")
    lines = path.read_text().splitlines()
    lines[150] = lines[180] = '{"text": "broken'
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"train\.jsonl, line 151: not valid JSON"):
        tokenize_source(path, chatml, max_length=None, name="data", folder=tmp_path / "tokens", workers=2, **SMALL)


class Deadly(Letters):
    """A tokenizer that ends every process but the one that it was made in."""

    def __init__(self):
        super().__init__()
        self.home = os.getpid()

    def _tokenize(self, text):
        if os.getpid() != self.home:
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._tokenize(text)


@pytest.mark.slow
def test_a_dead_process_is_explained(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"text": "some letters"}\n' * 50)
    with pytest.raises(UserError, match=r"exit status SIGKILL.*run the same command again"):
        tokenize_source(path, Deadly(), max_length=None, name="data", folder=tmp_path / "tokens", workers=2, **SMALL)


def test_an_empty_source_is_an_error(tmp_path, chatml):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no rows"):
        tokenize_source(tmp_path / "empty.jsonl", chatml, max_length=None, name="data")


@pytest.mark.slow
@pytest.mark.parametrize("place", [17, 300, 999])
def test_an_id_that_came_long_before_is_found(tmp_path, place):
    rows = [{"id": f"e{row}", "input_ids": [5, 6]} for row in range(1000)]
    rows[place]["id"] = "e7"
    with pytest.raises(DataError, match=f"row {place}: the id 'e7' is already that of row 7"):
        tokenize_source(rows, None, max_length=None, name="data", folder=tmp_path, held_bytes=0, part_rows=9)


@pytest.mark.slow
def test_memory_hardly_grows_with_the_examples(tmp_path, chatml):
    options = {"held_bytes": 2**18, "part_rows": 160}
    peaks = []
    for count in (1000, 5000):
        path = tmp_path / f"{count}.jsonl"
        with path.open("w") as file:
            file.writelines(json.dumps({"id": f"e{row}", "text": "sky " * 50}) + "\n" for row in range(count))
        tracemalloc.start()
        data = tokenize_source(path, chatml, max_length=None, name="data", folder=tmp_path / "tokens", **options)
        assert len(data) == count
        assert sum(len(ids) for ids in data.input_ids) == int(data.lengths.sum())
        assert sum(len(example.id) for example in data.examples) > count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # What is left is a record of each part, which has 160 examples here and otherwise thousands.
    assert (peaks[1] - peaks[0]) / 4000 < 64
