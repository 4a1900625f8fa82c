"""Data behind fsspec addresses, packed in every way, in formats that `datasets` reads, and in streams."""

import bz2
import gzip
import io
import json
import lzma
import zipfile
from pathlib import Path

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from vestige.data import load_examples, load_queries, require_data, tokenize, tokenize_source
from vestige.errors import DataError

ROWS = [{"id": name, "text": f"Text {name}, Grüße", "source": "web"} for name in "abc"]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture
def memory():
    system = fsspec.filesystem("memory")
    yield system
    for path in system.ls("/", detail=False):
        system.rm(path, recursive=True)


def packed(kind):
    if kind == "zip":
        held = io.BytesIO()
        with zipfile.ZipFile(held, "w") as file:
            file.writestr("train.jsonl", LINES)
        return held.getvalue()
    if kind in ("zst", "lz4"):
        held = pa.BufferOutputStream()
        with pa.CompressedOutputStream(held, {"zst": "zstd"}.get(kind, kind)) as file:
            file.write(LINES)
        return held.getvalue().to_pybytes()
    return {"gz": gzip, "bz2": bz2, "xz": lzma}[kind].compress(LINES)


def ids(source, **options):
    return [example.id for example in load_examples(source, **options)]


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz", "zip", "zst", "lz4"])
def test_packed_files_on_disk_and_behind_an_address(tmp_path, memory, kind):
    path = tmp_path / f"train.jsonl.{kind}"
    path.write_bytes(packed(kind))
    memory.pipe(f"/d/{path.name}", packed(kind))
    for source in (path, str(path), f"memory://d/{path.name}"):
        examples = load_examples(source)
        assert [(each.id, each.text) for each in examples] == [(row["id"], row["text"]) for row in ROWS]
    path.write_bytes(packed(kind)[:-9] if kind != "zip" else b"no archive")
    with pytest.raises(DataError, match=rf"train.jsonl.{kind}: cannot be read"):
        load_examples(path)


def test_an_archive_of_several_files_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "train.jsonl.zip", "w") as file:
        file.writestr("a.jsonl", LINES)
        file.writestr("b.jsonl", LINES)
    with pytest.raises(DataError, match="holds 2 files, expected one"):
        load_examples(tmp_path / "train.jsonl.zip")


def test_files_patterns_and_folders_behind_an_address(memory, capsys):
    memory.pipe("/d/train.jsonl", LINES)
    held = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(ROWS), held)
    memory.pipe("/d/train.parquet", held.getvalue())
    assert ids("memory://d/train.jsonl") == ids("memory://d/train.parquet") == ["a", "b", "c"]
    for number in range(2):
        memory.pipe(f"/parts/{number}.csv", f"id,text\n{number}-x,hello\n".encode())
    assert ids("memory://parts/*.csv") == ids("memory://parts") == ["0-x", "1-x"]
    assert "2 files, from 0.csv to 1.csv" in capsys.readouterr().err
    # The command line gives several files as paths.
    assert ids([Path("memory://parts/1.csv"), Path("memory://parts/0.csv")]) == ["1-x", "0-x"]
    assert [query.id for query in load_queries("memory://d/train.jsonl")] == ["a", "b", "c"]
    datasets.Dataset.from_list(ROWS).save_to_disk("memory://saved")
    assert ids("memory://saved") == ["a", "b", "c"]


def test_errors_behind_an_address_name_it(memory):
    memory.pipe("/d/train.jsonl", LINES + b'{"text": "broken\n')
    with pytest.raises(DataError, match=r"memory://d/train.jsonl, line 4: not valid JSON"):
        load_examples("memory://d/train.jsonl")
    for look in (load_examples, require_data):
        with pytest.raises(DataError, match=r"memory://d/trian.jsonl: no such file. Did you mean memory://d/train"):
            look("memory://d/trian.jsonl")
        with pytest.raises(DataError, match=r"the folder memory://nowhere does not exist either"):
            look("memory://nowhere/train.jsonl")
        with pytest.raises(DataError, match=r"nosuch://b/train.jsonl: such addresses cannot be read here"):
            look("nosuch://b/train.jsonl")
    require_data("memory://d/train.jsonl")


def test_tokens_of_an_address_are_found_again_until_it_changes(tmp_path, memory, chatml, capsys):
    memory.pipe("/d/train.jsonl", LINES)
    options = {"max_length": None, "name": "data", "folder": tmp_path / "tokens", "held_bytes": 0, "part_rows": 2}
    data = tokenize_source("memory://d/train.jsonl", chatml, **options)
    assert data.fingerprint == tokenize(load_examples(ROWS), chatml, max_length=None).fingerprint
    tokenize_source("memory://d/train.jsonl", chatml, **options)
    assert len(list((tmp_path / "tokens").iterdir())) == 1
    memory.pipe("/d/train.jsonl", LINES.replace(b"Text", b"Word"))
    assert tokenize_source("memory://d/train.jsonl", chatml, **options).fingerprint != data.fingerprint


def test_other_formats_are_read_by_the_library(tmp_path):
    (tmp_path / "train.txt").write_text("One line.\nAnother, Grüße.\n")
    assert [each.text for each in load_examples(tmp_path / "train.txt")] == ["One line.", "Another, Grüße."]
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    assert ids(arrow) == ["a", "b", "c"]
    (tmp_path / "train.arrow").write_bytes(b"no table")
    with pytest.raises(DataError, match=r"train.arrow: `datasets` does not read it as arrow"):
        load_examples(tmp_path / "train.arrow")


def test_a_stream_is_read_once(tmp_path):
    counter = tmp_path / "reads"
    counter.write_text("")
    features = datasets.Features({"id": datasets.Value("string"), "text": datasets.Value("string")})
    stream = datasets.IterableDataset.from_generator(
        counted, gen_kwargs={"counter": str(counter), "count": 1000}, features=features
    )
    assert len(load_examples(stream)) == 1000
    assert ids(stream) == [f"r{number}" for number in range(1000)]
    assert counter.read_text() == "x" * 1000


def counted(counter, count):
    """Rows that leave a mark for each time that one was fetched."""
    for number in range(count):
        with open(counter, "a") as file:
            file.write("x")
        yield {"id": f"r{number}", "text": f"Text {number}"}


def test_of_a_hub_id_with_a_limit_no_more_is_fetched(tmp_path, monkeypatch, capsys):
    counter, asked = tmp_path / "reads", []
    counter.write_text("")
    features = datasets.Features({"id": datasets.Value("string"), "text": datasets.Value("string")})

    def load_dataset(path, config=None, *, split=None, streaming=False):
        asked.append((path, config, split, streaming))
        made = datasets.IterableDataset.from_generator(
            counted, gen_kwargs={"counter": str(counter), "count": 1000}, features=features
        )
        return made if split else {"train": made, "test": made}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    fetched = []
    for _ in range(2):
        assert ids("owner/name:main:train", limit=5) == ["r0", "r1", "r2", "r3", "r4"]
        fetched.append(len(counter.read_text()))
    assert "only the first 5 rows are used (limit=5)" in capsys.readouterr().err
    assert fetched[0] == fetched[1] < 10
    assert len(ids("owner/name::test", limit=2)) == 2
    assert asked == [*2 * [("owner/name", "main", "train", True)], ("owner/name", None, "test", True)]
    with pytest.raises(DataError, match=r"asks for another split than split='dev'"):
        load_examples("owner/name:main:train", split="dev")


def test_a_split_of_a_saved_folder_stands_behind_its_name(tmp_path):
    parts = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[1:])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    require_data(f"{tmp_path / 'saved'}::test")
    assert ids(f"{tmp_path / 'saved'}::test") == ["b", "c"]
    with pytest.raises(DataError, match="no split 'dev'; its splits are train, test"):
        load_examples(f"{tmp_path / 'saved'}::dev")
