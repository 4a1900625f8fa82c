import gzip
import json
from pathlib import Path

import datasets
import huggingface_hub.constants
import pyarrow
import pyarrow.parquet
import pytest

from vestige.data import load_examples, load_queries
from vestige.errors import DataError

ROWS = [
    {"id": "a", "text": 'One, "two"\nthree', "source": "web"},
    {"id": "b", "text": "Grüße 世界", "source": "book"},
    {"id": "c", "text": "", "source": "book"},
]


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def write(path: Path, rows=ROWS) -> Path:
    """The rows in the format of the path's extension, written by other code than Vestige's."""
    if path.suffix == ".jsonl":
        path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        separator = "\t" if path.suffix == ".tsv" else ","
        lines = [list(rows[0]), *(row.values() for row in rows)]
        quoted = [separator.join('"' + str(cell).replace('"', '""') + '"' for cell in line) for line in lines]
        path.write_text("\r\n".join(quoted) + "\r\n", encoding="utf-8", newline="")
    return path


def check(examples):
    assert [example.id for example in examples] == ["a", "b", "c"]
    assert [example.text for example in examples] == [row["text"] for row in ROWS]
    assert [example.source for example in examples] == ["web", "book", "book"]


@pytest.mark.parametrize("extension", ["jsonl", "json", "csv", "tsv", "parquet"])
@pytest.mark.parametrize("kind", [str, Path])
def test_files(tmp_path, extension, kind):
    check(load_examples(kind(write(tmp_path / f"train.{extension}"))))


def test_the_folder_that_vestige_data_left_is_read_by_its_rows(tmp_path):
    write(tmp_path / "data.jsonl")
    write(tmp_path / "flagged.jsonl", [{"id": "no", "text": "left out"}])
    (tmp_path / "prepare.json").write_text("{}")
    check(load_examples(tmp_path))
    (tmp_path / "data.jsonl").rename(tmp_path / "train.jsonl")
    with pytest.raises(DataError, match=r"several files of rows here \(flagged.jsonl, train.jsonl\). Give one of them"):
        load_examples(tmp_path)


@pytest.mark.parametrize("extension", ["jsonl", "json", "csv"])
def test_packed_files(tmp_path, extension):
    plain = write(tmp_path / f"train.{extension}")
    packed = tmp_path / f"train.{extension}.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    check(load_examples(packed))


def test_json_with_data_and_json_lines_under_another_name(tmp_path):
    path = tmp_path / "train.json"
    path.write_text(json.dumps({"version": 1, "data": ROWS}), encoding="utf-8")
    check(load_examples(path))
    path.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    check(load_examples(path))


def test_a_byte_order_mark_is_dropped(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("text\nhello\n", encoding="utf-8-sig")
    assert load_examples(path)[0].text == "hello"


def test_a_very_long_cell_is_read(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("text\n" + "x" * 200_000 + "\n", encoding="utf-8")
    assert len(load_examples(path)[0].text or "") == 200_000


def test_live_dataset_in_any_format():
    dataset = datasets.Dataset.from_list([{**row, "input_size": 3} for row in ROWS])
    check(load_examples(dataset))
    formatted = load_examples(dataset.with_format("torch"))
    check(formatted)
    assert type(formatted[0].extra["input_size"]) is int
    check(load_examples(dataset.to_iterable_dataset()))


def test_absent_columns_of_a_mixed_dataset_are_absent():
    dataset = datasets.Dataset.from_dict({"text": ["a", None], "prompt": [None, "p"], "completion": [None, "c"]})
    first, second = load_examples(dataset)
    assert first.text == "a"
    assert first.extra == {}
    assert (second.text, second.prompt, second.completion) == (None, "p", "c")


def test_saved_folder(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    check(load_examples(tmp_path / "saved"))
    check(load_examples(str(tmp_path / "saved")))


def test_splits_of_a_saved_folder(tmp_path, capsys):
    rows = datasets.Dataset.from_list(ROWS)
    other = datasets.Dataset.from_list([{"text": "other"}])
    datasets.DatasetDict({"train": rows, "test": other}).save_to_disk(tmp_path / "saved")
    check(load_examples(tmp_path / "saved"))
    assert "reading the split 'train' (of train, test)" in capsys.readouterr().err
    assert load_examples(tmp_path / "saved", split="test")[0].text == "other"
    with pytest.raises(DataError, match="no split 'dev'; its splits are train, test"):
        load_examples(tmp_path / "saved", split="dev")
    with pytest.raises(DataError, match="which of its splits"):
        load_examples(datasets.DatasetDict({"a": rows, "b": other}))
    check(load_examples(datasets.DatasetDict({"only": rows})))


def test_a_split_of_what_has_none_is_refused(tmp_path):
    for source in (write(tmp_path / "train.jsonl"), ROWS, datasets.Dataset.from_list(ROWS)):
        with pytest.raises(DataError, match="split"):
            load_examples(source, split="train")


def test_hub_id_with_config_and_split_goes_to_the_library(monkeypatch):
    asked = []

    def load_dataset(path, config=None, *, split=None):
        asked.append((path, config, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    check(load_examples("owner/name:main", split="test"))
    check(load_queries("owner/name"))
    assert asked == [("owner/name", "main", "test"), ("owner/name", None, None)]


def test_hub_id_offline_is_explained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "train.jsonl")
    with pytest.raises(DataError, match=r"nobody/nothing: no such file.*not loaded from the hub either"):
        load_examples("nobody/nothing")
    with pytest.raises(DataError, match=r"Did you mean train.jsonl\?.*hub"):
        load_examples("train")


def test_a_missing_config_names_the_way_to_write_it(monkeypatch):
    def load_dataset(*_, **__):
        raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['main']")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match="writing owner/name:CONFIG"):
        load_examples("owner/name")


def test_absent_file_suggests_the_nearest(tmp_path):
    write(tmp_path / "train.jsonl")
    with pytest.raises(DataError, match=r"trian.jsonl: no such file. Did you mean .*/train.jsonl\?"):
        load_examples(tmp_path / "trian.jsonl")
    with pytest.raises(DataError, match="holds nothing of a similar name"):
        load_examples(tmp_path / "zzz.csv")
    with pytest.raises(DataError, match=r"the folder .*/nowhere does not exist either"):
        load_examples(str(tmp_path / "nowhere" / "train.jsonl"))


@pytest.mark.parametrize("name", ["train.jsonl", "train.json", "train.csv"])
def test_an_empty_file_is_refused(tmp_path, name):
    (tmp_path / name).write_text("", encoding="utf-8")
    with pytest.raises(DataError, match=f"{name} holds no rows"):
        load_examples(tmp_path / name)


@pytest.mark.parametrize("empty", [[], "[]", datasets.Dataset.from_list([])])
def test_empty_sources_are_refused(tmp_path, empty):
    if isinstance(empty, str):
        (tmp_path / "train.json").write_text(empty, encoding="utf-8")
        empty = tmp_path / "train.json"
    with pytest.raises(DataError, match="holds no rows"):
        load_examples(empty)


def test_a_csv_with_a_header_alone_is_empty(tmp_path):
    (tmp_path / "train.csv").write_text("text,id\n", encoding="utf-8")
    with pytest.raises(DataError, match="holds no rows"):
        load_examples(tmp_path / "train.csv")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n\n{"text": "y"\n', r"a.jsonl, line 3: not valid JSON: Expecting ',' delimiter"),
        ("a.jsonl", '{"text": "x"}\n[1]\n', r"a.jsonl, row 1 \(line 2\): expected an object"),
        ("a.jsonl", '{"text": "x"}\n\n{"body": "y"}\n', r"a.jsonl, row 1 \(line 3\): its columns are `body`"),
        ("a.json", '[{"text": "x"},\n{"text": }]', r"a.json, line 2: not valid JSON: Expecting value"),
        ("a.json", '{"text": "x", "n": 1}', r"expected a list of rows .* with the keys text, n"),
        ("a.json", "3", r"expected a list of rows .* got 3"),
        ("a.json", '{"text": "x"}\n{"text": oops}\n', r"a.json, line 2: not valid JSON"),
        ("a.csv", "text,id\nx,1\ny,2,3\n", r"a.csv, line 3: 3 cells, but the header has 2 \(text, id\)"),
        ("a.csv", "text,id\nx\n", r"a.csv, line 2: 1 cells, but the header has 2"),
        ("a.csv", 'text\n"x\ny"\nz,1\n', r"a.csv, line 4: 2 cells"),
        ("a.csv", 'text\n"x" y\n', r"a.csv, line 2: not valid CSV"),
        ("a.csv", "text,text\nx,y\n", r"line 1: the header names 'text' more than once"),
        ("a.csv", "body\nx\n", r"a.csv, row 0 \(line 2\): its columns are `body`"),
        ("a.parquet", "not parquet", r"a.parquet: not a Parquet file"),
        ("a.docx", "x", r"a.docx: the extension '.docx' is not one that can be read. Give a file ending in .jsonl"),
        ("data", "x", r"the extension '\(none\)' is not one"),
        ("a.jsonl.gz", "not packed", r"a.jsonl.gz: cannot be read"),
    ],
)
def test_broken_files_are_explained(tmp_path, name, content, message):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        load_examples(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_another_encoding_is_explained(tmp_path, name):
    (tmp_path / name).write_bytes('{"text": "Grüße"}'.encode("latin-1"))
    with pytest.raises(DataError, match=r"not UTF-8 text \(byte 12 is 0xfc\).*iconv"):
        load_examples(tmp_path / name)


def parts(folder):
    """Three files, named so that their order is not that of their numbers as words."""
    for number in range(3):
        rows = [{"text": f"part {number} row {row}", "id": f"{number}-{row}"} for row in range(2)]
        (folder / f"part-{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [f"{number}-{row}" for number in range(3) for row in range(2)]


def test_a_folder_a_pattern_and_a_list_of_paths_are_their_files_in_order(tmp_path, capsys):
    ids = parts(tmp_path)
    (tmp_path / "README.md").write_text("Not data.")
    paths = sorted(tmp_path.glob("*.jsonl"))
    for source in (tmp_path, str(tmp_path / "part-*.jsonl"), tmp_path / "**" / "*.jsonl", paths):
        examples = load_examples(source)
        assert [example.id for example in examples] == ids
        assert [example.row for example in examples] == list(range(6))
    assert "3 files, from part-0.jsonl to part-2.jsonl" in capsys.readouterr().err
    assert [example.id for example in load_examples(paths[::-1], limit=3)] == ["2-0", "2-1", "1-0"]
    assert [example.id for example in load_queries(str(tmp_path / "part-?.jsonl"))] == ids


def test_an_error_in_one_of_several_files_names_it(tmp_path):
    parts(tmp_path)
    (tmp_path / "part-1.jsonl").write_text('{"text": "a", "id": "x"}\n{"text": "b", "id": "0-1"}\n')
    with pytest.raises(DataError, match=r"row 3 \(part-1.jsonl, line 2\): the id '0-1' is already that of row 1"):
        load_examples(tmp_path)
    (tmp_path / "part-2.jsonl").write_text('{"text": 3}\n')
    with pytest.raises(DataError, match=r"part-2.jsonl, line 1"):
        load_examples([tmp_path / "part-0.jsonl", tmp_path / "part-2.jsonl"])


def test_a_folder_without_data_and_one_of_several_kinds_are_explained(tmp_path):
    with pytest.raises(DataError, match="neither holds data files nor was saved by"):
        load_examples(tmp_path)
    write(tmp_path / "train.jsonl")
    write(tmp_path / "train.csv")
    with pytest.raises(DataError, match=r"several kinds \(.csv, .jsonl\). Name those to read, for example .*\*\.csv"):
        load_examples(tmp_path)
    with pytest.raises(DataError, match=r"no-\*.jsonl: no such file"):
        load_examples(tmp_path / "no-*.jsonl")


def test_a_damaged_saved_folder_is_explained(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    for file in (tmp_path / "saved").glob("*.arrow"):
        file.unlink()
    with pytest.raises(DataError, match="does not load"):
        load_examples(tmp_path / "saved")


@pytest.mark.parametrize("source", [3, None, {"text": "x"}, iter([])])
def test_other_types_are_refused(source):
    with pytest.raises(DataError, match=rf"Data of type {type(source).__name__} cannot be read"):
        load_examples(source)


def test_an_empty_path_is_refused():
    with pytest.raises(DataError, match="path of the data is empty"):
        load_examples("")


def test_a_limit_is_announced_when_it_leaves_rows_out(tmp_path, capsys):
    path = write(tmp_path / "train.jsonl")
    assert [example.id for example in load_examples(path, limit=2)] == ["a", "b"]
    assert "train.jsonl: only the first 2 rows are used (limit=2)" in capsys.readouterr().err
    check(load_examples(path, limit=3))
    check(load_examples(path, limit=4))
    assert capsys.readouterr().err == ""
    with pytest.raises(DataError, match="limit=0"):
        load_examples(path, limit=0)


@pytest.mark.parametrize(
    "prompt",
    ["Why is the sky blue?", "Hello", "and what\nabout this/that", "x" * 5000, "one/two or three", "nul\0byte", "~x y"],
)
def test_a_single_string_that_is_no_place_is_a_prompt(prompt):
    (query,) = load_queries(prompt)
    assert (query.prompt, query.completion, query.id) == (prompt, None, "0")


@pytest.mark.parametrize("place", ["queries.jsonl", "./queries", "~/nothing-here", "/nothing/here", "../queries"])
def test_a_single_string_that_looks_like_a_place_is_one(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no such file"):
        load_queries(place)


def test_queries_from_a_file(tmp_path):
    path = tmp_path / "queries.json"
    path.write_text('["Why?", {"prompt": "a", "completion": "b"}]', encoding="utf-8")
    first, second = load_queries(str(path))
    assert (first.prompt, first.text) == ("Why?", None)
    assert second.completion == "b"
