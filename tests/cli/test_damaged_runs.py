"""Runs that were damaged, or made by somebody else: every command that reads one says what is wrong, with status 2."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from vestige.cli import main

DEEP = "[" * 100_000 + "]" * 100_000
READERS = {
    "report": ("report", "run", "--out", "page.html"),
    "status": ("status", "run"),
    "select": ("select", "--scores", "run", "--data", "train.jsonl", "--budget", "2", "--out", "chosen"),
    "export": ("export", "run", "--to", "csv", "--out", "copy"),
    "overlap": ("evaluate", "overlap", "--run", "run", "--out", "overlap"),
}


@pytest.fixture(scope="module")
def finished(furnished, tmp_path_factory):
    """A run of words alone, with all its scores, to be copied."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    words = ("--data", str(furnished / "train.jsonl"), "--queries", str(furnished / "questions.jsonl"))
    main(["attribute", *words, "--method", "bm25", "--k", "3", "--out", str(folder)])
    return folder


@pytest.fixture
def run(workshop, finished):
    shutil.copytree(finished, workshop / "run")
    return workshop / "run"


def answers(vestige, *, may_succeed: tuple[str, ...] = ()) -> dict[str, str]:
    """What each reader says; none of them ends with anything but success or a user's error."""
    said = {}
    for name, words in READERS.items():
        outcome = vestige(*words)
        assert outcome.status in ((0, 2) if name in may_succeed else (2,)), (name, outcome.err)
        said[name] = outcome.err
    return said


def edit_record(run: Path, **changes) -> None:
    path = run / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_table(run: Path, name: str, column: str, value: object) -> None:
    """Put `value` into every row of a column."""
    path = run / f"{name}.parquet"
    table = parquet.read_table(path)
    place, field = table.column_names.index(column), table.schema.field(column)
    parquet.write_table(table.set_column(place, field, pa.array([value] * len(table), field.type)), path)
    edit_record(run, files={})  # as in a run of an earlier version, or in one that was made to deceive


@pytest.mark.parametrize(
    "content",
    ["", "[", "[]", "5", DEEP, '{"format": 1, "x": ' + DEEP + "}", '{"format": 1, "x": ' + "9" * 5000 + "}"],
    ids=lambda content: content[:20],
)
def test_a_record_that_is_none(content, run, vestige):
    (run / "run.json").write_text(content)
    answers(vestige)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "x", None, [], DEEP])
def test_a_record_whose_numbers_are_none(value, run, vestige):
    edit_record(run, seconds=value)
    assert "run.json is not a run record" in answers(vestige)["status"]


@pytest.mark.parametrize("name", ["scores", "examples", "queries"])
@pytest.mark.parametrize("damage", ["torn", "gone", "columns", "types"])
def test_a_table_that_is_none(damage, name, run, vestige):
    path = run / f"{name}.parquet"
    edit_record(run, files={})
    table = parquet.read_table(path)
    if damage == "torn":
        path.write_bytes(path.read_bytes()[:100])
    elif damage == "gone":
        path.unlink()
    elif damage == "columns":
        parquet.write_table(table.drop_columns(["row"]), path)
    else:
        parquet.write_table(
            table.set_column(table.column_names.index("row"), "row", pa.array(["x"] * len(table))), path
        )
    said = answers(vestige, may_succeed=("status", "select", "overlap", "export"))
    assert f"{name}.parquet" in said["report"]


CELLS = [
    ("examples", "messages", "{"),
    ("examples", "messages", '[{"text": "no role"}]'),
    ("examples", "messages", "5"),
    ("examples", "messages", DEEP),
    ("examples", "row", None),
    ("queries", "messages", "["),
    ("queries", "query_id", None),
    ("scores", "rank", None),
    ("scores", "row", None),
    ("scores", "row", 10**9),
    ("scores", "query_id", "nobody"),
]


@pytest.mark.parametrize(("table", "column", "value"), CELLS)
def test_a_cell_that_cannot_be(table, column, value, run, vestige):
    edit_table(run, table, column, value)
    said = answers(vestige, may_succeed=("status", "select", "overlap", "export"))
    assert f"{table}.parquet" in said["report"] or "scores.parquet names" in said["report"]


def test_more_targets_than_tokens(run, vestige):
    for column, value in (("tokens", ["a"]), ("targets", [True, False])):
        edit_table(run, "examples", column, value)
    said = answers(vestige, may_succeed=("status", "select", "overlap"))
    assert "row 0: 1 tokens and 2 targets" in said["report"]


def test_scores_of_all_examples_that_are_torn(vestige, run):
    words = ("--data", "train.jsonl", "--queries", "questions.jsonl", "--method", "bm25", "--dense", "--out", "dense")
    assert vestige("attribute", *words).status == 0
    edit_record(Path("dense"), files={})
    path = Path("dense/scores.safetensors")
    whole = path.read_bytes()
    parts = [b"", whole[:40], whole[:-8], whole + b"x", b"\xff" * 8 + whole[8:], whole.replace(b"[2,12]", b"[12,2]")]
    for content in [*parts, (9000).to_bytes(8, "little") + b'"scores":' + b"[" * 9000]:
        path.write_bytes(content)
        outcome = vestige("select", "--scores", "dense", "--data", "train.jsonl", "--budget", "2", "--out", "chosen")
        assert outcome.status == 2, content[:40]
        assert "scores.safetensors" in outcome.err
