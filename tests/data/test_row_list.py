"""Rows are named by what reports, selections and people write."""

import json

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from vestige.data import read_row_list, rows_named
from vestige.errors import DataError

IDS = ["a", "b,c", "=d", "e f"]
RECORDS = [
    {"query_id": "q", "rank": 1, "example_id": "b,c", "row": 1},
    {"query_id": "q", "rank": 2, "example_id": "=d"},
]


def rows(path, ids=IDS, **options):
    names = [entry.name for entry in read_row_list(path)]
    return list(rows_named(names, ids, place=str(path), **options).values())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("ids.txt", "b,c\n\n=d\n"),
        ("windows.txt", "\ufeffb,c\r\n=d\r\n"),
        ("without-extension", "b,c\n=d"),
        ("list.csv", 'query_id,example_id,prompt\nq,"b,c","two\nlines"\nq,\'=d,x\n'),
        ("list.tsv", "id\tscore\nb,c\t1\n=d\t2\n"),
        ("excel.csv", "example_id;score\nb,c;1\n=d;2\n"),
        ("list.jsonl", "".join(json.dumps(record) + "\n" for record in RECORDS)),
        ("list.json", json.dumps(RECORDS)),
        ("names.json", '["b,c", "=d"]'),
        ("named-wrongly.txt", "".join(json.dumps(record) + "\n" for record in RECORDS)),
        ("separator.jsonl", '{"id": "b,c", "text": "one\u2028two"}\n{"id": "=d"}\n'),
        ("numbers.txt", "1\n2\n"),
        ("rows.csv", "row,score\n1,0.5\n2,0.25\n"),
        ("flags.jsonl", '{"id": "b,c", "flagged": true}\n{"id": "a", "flagged": false}\n{"id": "=d", "flagged": 1}\n'),
    ],
)
def test_every_form_names_the_same_rows(name, content, tmp_path):
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    assert rows(tmp_path / name) == [1, 2]


@pytest.mark.parametrize("name", ["selected.parquet", "at_risk.parquet", "mine.parquet"])
def test_tables_and_the_folders_that_hold_them(name, tmp_path):
    parquet.write_table(pa.table({"example_id": ["b,c", "=d"], "rank": [1, 2]}), tmp_path / name)
    assert rows(tmp_path / name) == [1, 2]
    if name != "mine.parquet":
        assert rows(tmp_path) == [1, 2]


def test_ids_win_over_row_numbers_and_row_numbers_are_announced(capsys):
    assert rows_named(["1", "0"], ["0", "2", "1"], place="list") == {"1": 2, "0": 0}
    assert "row numbers" not in capsys.readouterr().err
    assert rows_named(["1", "0"], ["x", "y"], place="list") == {"1": 1, "0": 0}
    assert "row numbers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "ids"),
    [(["a", "nope"], IDS), (["4"], IDS), (["-1"], IDS), (["0", "5"], ["0", "1"]), (["nope"], IDS), (["1", "a"], IDS)],
)
def test_names_that_are_no_rows_are_listed(names, ids):
    with pytest.raises(DataError, match=r"mine.txt names 1 rows that the data does not have: '"):
        rows_named(names, ids, place="mine.txt")
    known = set(names) & set(ids)
    if known:
        assert set(rows_named(names, ids, place="mine.txt", partial=True)) == known


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"\n\n", "names no rows"),
        ("latin.txt", b"caf\xe9\n", "does not read as a list of rows"),
        ("torn.jsonl", b'{"id": "a"}\n{"id"', "does not read as a list of rows"),
        ("deep.json", b"[" * 100_000, "does not read as a list of rows"),
        ("table.parquet", b"PAR1", "does not read as a list of rows"),
        ("columns.jsonl", b'{"name": "a"}\n', "entry 1: names no row"),
        ("null.jsonl", b'{"id": null}\n', "entry 1: names no row"),
    ],
)
def test_what_is_no_list_is_refused_in_words(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        read_row_list(tmp_path / name)


def test_a_run_is_no_list_and_the_way_to_one_is_said(tmp_path):
    parquet.write_table(pa.table({"example_id": ["a"]}), tmp_path / "scores.parquet")
    with pytest.raises(DataError, match="Row list"):
        read_row_list(tmp_path)
    with pytest.raises(DataError, match="not there"):
        read_row_list(tmp_path / "nowhere.txt")
