import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors import safe_open

from vestige.data import Example
from vestige.errors import CorruptFile, IndexMismatch, UserError
from vestige.runs import RunTables, Scores, check_target, file_faults, read_record, write_run

COLUMNS = {
    "scores": ["query_id", "end", "rank", "example_id", "row", "score", "percentile"],
    "examples": [
        *("example_id", "row", "text", "prompt", "completion", "messages", "source", "label"),
        *("length", "duplicates", "tokens", "targets"),
    ],
    "queries": [
        *("query_id", "row", "text", "prompt", "completion", "messages", "instead", "span", "weights"),
        *("generated", "loss", "tokens", "targets"),
    ],
    "components": ["query_id", "example_id", "component", "score"],
    "tokens": ["query_id", "example_id", "position", "token", "score"],
}


def test_every_file_has_the_agreed_columns(tmp_path, record, content):
    folder = write_run(tmp_path / "new" / "run", record, content)
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["run.json", "scores.safetensors", *(f"{name}.parquet" for name in COLUMNS)]
    )
    for name, columns in COLUMNS.items():
        assert pq.read_table(folder / f"{name}.parquet").column_names == columns
    assert [path.name for path in folder.parent.iterdir()] == ["run"]


def test_examples_carry_words_tokens_and_copies(tmp_path, record, content):
    folder = write_run(tmp_path / "run", record, content)
    rows = {row["example_id"]: row for row in pq.read_table(folder / "examples.parquet").to_pylist()}
    assert [rows[name]["duplicates"] for name in "abcd"] == [2, 1, 1, 2]
    assert json.loads(rows["c"]["messages"]) == [
        {"role": "user", "content": "hé"},
        {"role": "assistant", "content": "ho"},
    ]
    assert "".join(rows["c"]["tokens"]) == "user: hé\nassistant: ho"
    assert rows["b"]["completion"] == "because"
    assert rows["b"]["label"] == "x"
    assert rows["b"]["length"] == len(rows["b"]["tokens"]) == len(rows["b"]["targets"]) == 12
    assert rows["b"]["targets"][:2] == [False, True]


def test_examples_given_as_tokens_alone_are_copies_by_token_and_read_from_them(tmp_path, record, content):
    for row in (0, 1, 3):
        content.train.examples[row] = Example(content.train.examples[row].id, row)
    folder = write_run(tmp_path / "run", record, content)
    rows = {row["example_id"]: row for row in pq.read_table(folder / "examples.parquet").to_pylist()}
    assert [rows[name]["duplicates"] for name in "abd"] == [2, 1, 2]
    assert Scores.open(folder).top(0, 1)[0].text == "the sky is blue"


def test_token_rows_are_the_targets_and_add_up(tmp_path, record, content):
    folder = write_run(tmp_path / "run", record, content)
    rows = pq.read_table(folder / "tokens.parquet").to_pylist()
    mine = [row for row in rows if (row["query_id"], row["example_id"]) == ("q1", "b")]
    assert [row["position"] for row in mine] == list(range(1, 12))
    assert [row["token"] for row in mine[:3]] == list("hy?")
    assert sum(row["score"] for row in mine) == pytest.approx(9.0)


def test_the_record_comes_back_as_it_was(tmp_path, record, content):
    folder = write_run(tmp_path / "run", record, content)
    assert read_record(folder).model_copy(update={"files": {}}) == record
    plain = json.loads((folder / "run.json").read_text())
    assert plain["format"] == 1
    assert plain["meaning"]["unit"] == "nats"
    assert plain["trust"]["checks"][0]["value"] is None
    assert plain["distribution"]["q0"]["count"] == 5
    assert plain["groups"]["q0"][0].keys() == {
        *("source", "examples", "sum", "mean", "low", "high", "positive", "positive_squares")
    }


def test_dense_scores_name_their_axes(tmp_path, record, content, all_scores):
    folder = write_run(tmp_path / "run", record, content)
    with safe_open(folder / "scores.safetensors", framework="numpy") as file:
        assert file.metadata()["axes"] == "query example"
        assert json.loads(file.metadata()["example_ids"]) == list("abcde")
        assert np.array_equal(file.get_tensor("scores"), all_scores)


def test_optional_files_are_left_out(tmp_path, record, content):
    bare = RunTables(content.train, content.queries, content.ranked, generated=[False, False])
    folder = write_run(tmp_path / "run", record, bare)
    assert sorted(path.name for path in folder.iterdir()) == [
        *("examples.parquet", "queries.parquet", "run.json", "scores.parquet")
    ]
    assert pq.read_table(folder / "queries.parquet")["loss"].to_pylist() == [None, None]


def test_a_run_is_replaced_only_when_asked(tmp_path, record, content):
    folder = write_run(tmp_path / "run", record, content)
    before = (folder / "run.json").stat().st_mtime_ns
    with pytest.raises(IndexMismatch, match="--overwrite"):
        write_run(folder, record, content)
    assert (folder / "run.json").stat().st_mtime_ns == before
    shorter = RunTables(content.train, content.queries, content.ranked, generated=[False, False])
    write_run(folder, record, shorter, overwrite=True)
    assert not (folder / "tokens.parquet").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_is_not_a_run_is_never_replaced(tmp_path, record, content):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(UserError, match="not a run"):
        write_run(tmp_path / "thesis", record, content, overwrite=True)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"
    with pytest.raises(UserError, match="is a file"):
        check_target(tmp_path / "thesis" / "chapter.tex")
    (tmp_path / "empty").mkdir()
    assert write_run(tmp_path / "empty", record, content).is_dir()


def test_a_failure_half_way_leaves_nothing_behind(tmp_path, record, content):
    folder = write_run(tmp_path / "run", record, content)
    broken = content._replace(dense=np.zeros((1, 1), dtype=np.float32))
    with pytest.raises(Exception, match="Dense scores of shape"):
        write_run(folder, record, broken, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert read_record(folder).model_copy(update={"files": {}}) == record


def test_two_queries_with_one_id_are_refused(tmp_path, record, content):
    content.queries.examples[1] = Example("q0", 1, text="why")
    with pytest.raises(UserError, match="Two queries have the id 'q0'"):
        write_run(tmp_path / "run", record, content)


def test_reading_says_what_is_wrong(tmp_path, record, content):
    with pytest.raises(UserError, match="is not a run"):
        read_record(tmp_path)
    folder = write_run(tmp_path / "run", record, content)
    plain = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(plain | {"later": 1}))
    assert read_record(folder).method == "grad-dot"
    (folder / "run.json").write_text(json.dumps({"format": 2, "vestige": "9.0"}))
    with pytest.raises(UserError, match=r"Vestige 9\.0 in run format 2"):
        read_record(folder)
    (folder / "run.json").write_text(json.dumps({name: plain[name] for name in plain if name != "seconds"}))
    with pytest.raises(CorruptFile, match="seconds"):
        read_record(folder)


FILES = ["scores.safetensors", *(f"{name}.parquet" for name in COLUMNS)]


def alter(path, place: int = -20) -> None:
    """Change one bit."""
    body = bytearray(path.read_bytes())
    body[place] ^= 1
    path.write_bytes(body)


@pytest.mark.parametrize("name", FILES)
def test_an_altered_or_missing_file_is_refused_by_name(tmp_path, record, content, name):
    folder = write_run(tmp_path / "run", record, content)
    assert read_record(folder).files.keys() == set(FILES)
    assert Scores.open(folder).dense().shape == (2, 5)
    alter(folder / name)
    with pytest.raises(CorruptFile, match=rf"{name} was altered(.|\n)*vestige status --verify"):
        Scores.open(folder).dense()
    (folder / name).unlink()
    with pytest.raises((CorruptFile, UserError), match=f"{name} is missing" if name != FILES[0] else "--dense"):
        Scores.open(folder).dense()
    faults = file_faults(folder, read_record(folder, checked=False).files)
    assert [each for each, fault in faults.items() if fault] == [name]


def test_rows_put_into_a_whole_table_are_found(tmp_path, record, content):
    folder = write_run(tmp_path / "run", record, content)
    table = pq.read_table(folder / "scores.parquet")
    pq.write_table(table.set_column(5, "score", [[9.0] * len(table)]), folder / "scores.parquet", compression="zstd")
    with pytest.raises(CorruptFile, match=r"scores\.parquet was altered"):
        Scores.open(folder)


def test_a_run_of_an_earlier_version_has_no_digests_and_opens(tmp_path, record, content):
    folder = write_run(tmp_path / "run", record, content)
    known = json.loads((folder / "run.json").read_text())
    del known["files"]
    (folder / "run.json").write_text(json.dumps(known))
    assert Scores.open(folder).dense().shape == (2, 5)
    assert read_record(folder).files == {}


def test_digests_of_files_outside_of_the_run_are_refused(tmp_path, record, content):
    folder = write_run(tmp_path / "run", record, content)
    known = json.loads((folder / "run.json").read_text())
    for name in ("../secret", "/dev/zero"):
        (folder / "run.json").write_text(json.dumps(known | {"files": {name: "0"}}))
        with pytest.raises(CorruptFile, match="outside"):
            Scores.open(folder)
