"""Rows chosen by the values of their columns: `--where column=value`."""

import json

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from vestige.data import load_examples, load_queries, load_records, tokenize_source, write_rows
from vestige.errors import DataError

ROWS = [
    {"text": "zero", "source": "web", "year": 2020, "good": True},
    {"text": "one", "source": "book", "year": 2021, "good": False},
    {"text": "two", "source": "web", "year": 2021, "good": True},
    {"text": "three", "source": "web", "year": 2021.0, "good": None},
]


def write(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("where", "texts"),
    [
        ({"source": "web"}, ["zero", "two", "three"]),
        ({"source": "web", "year": "2021"}, ["two", "three"]),
        ({"year": 2020}, ["zero"]),
        ({"good": "true"}, ["zero", "two"]),
        ({"good": False}, ["one"]),
        ({}, ["zero", "one", "two", "three"]),
    ],
)
def test_rows_with_all_values_are_used(tmp_path, where, texts):
    parquet.write_table(pa.Table.from_pylist(ROWS[:3]), tmp_path / "train.parquet")
    for source in (write(tmp_path / "train.jsonl"), ROWS):
        examples = load_examples(source, where=where)
        assert [example.text for example in examples] == texts
        assert [example.row for example in examples] == list(range(len(texts)))
        # Their ids are those that they have without a choice.
        assert [example.id for example in examples] == [
            str([row["text"] for row in ROWS].index(text)) for text in texts
        ]
        assert [example.text for example, _ in load_records(source, where=where)] == texts
    if where == {"source": "web"}:
        assert [each.text for each in load_examples(tmp_path / "train.parquet", where=where)] == ["zero", "two"]
        assert len(load_queries(str(tmp_path / "train.jsonl"), where=where)) == 3


def test_what_is_left_out_is_announced_and_the_limit_counts_what_is_left(tmp_path, capsys):
    examples = load_examples(write(tmp_path / "train.jsonl"), where={"source": "web"}, limit=2)
    assert [example.text for example in examples] == ["zero", "two"]
    assert "only the first 2 rows are used" in capsys.readouterr().err
    load_examples(tmp_path / "train.jsonl", where={"source": "web"})
    assert "train.jsonl: 3 of 4 rows have source=web; the others are left out." in capsys.readouterr().err


def test_values_that_no_row_has_are_refused_with_those_that_there_are(tmp_path):
    path = write(tmp_path / "train.jsonl")
    with pytest.raises(DataError, match=r"none of its 4 rows has source=wbe \(`source` is 'web', 'book'\)"):
        load_examples(path, where={"source": "wbe"})
    with pytest.raises(DataError, match=r"no row has a column `sauce`"):
        load_examples(path, where={"sauce": "web"})


def test_errors_name_the_row_of_the_source(tmp_path):
    rows = [*ROWS, {"texts": "x", "source": "web"}]
    with pytest.raises(DataError, match=r"train.jsonl, row 4 \(line 5\): its columns are"):
        load_examples(write(tmp_path / "train.jsonl", rows), where={"source": "web"})
    rows[4] = {"id": "2", "text": "x", "source": "web"}
    with pytest.raises(DataError, match=r"row 4 \(line 5\): the id '2' is already that of row 2"):
        load_examples(write(tmp_path / "train.jsonl", rows), where={"source": "web"})


def test_tokens_of_a_choice_are_its_own(tmp_path, chatml):
    path = write(tmp_path / "train.jsonl")
    options = {"max_length": None, "name": "data", "folder": tmp_path / "tokens", "held_bytes": 0, "part_rows": 2}
    chosen = tokenize_source(path, chatml, where={"source": "web"}, **options)
    assert [example.id for example in chosen.examples] == ["0", "2", "3"]
    assert len(tokenize_source(path, chatml, **options)) == 4
    assert len(list((tmp_path / "tokens").iterdir())) == 2


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_of_a_choice_are_written_as_they_stand(tmp_path, kind):
    path = tmp_path / f"train.{kind}"
    if kind == "jsonl":
        write(path)
    else:
        parquet.write_table(pa.Table.from_pylist(ROWS), path)
    written = write_rows(path, {1, 2}, tmp_path, "kept", where={"source": "web"})
    assert [example.text for example in load_examples(written)] == ["two", "three"]
