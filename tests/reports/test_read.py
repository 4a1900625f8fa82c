import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.reports.fixture_run import write_fixture_run
from vestige.errors import UserError
from vestige.reports import make_payload, read_run, report


def test_proponents_come_first_each_end_by_rank(run_folder):
    run = read_run(run_folder)
    assert list(run.ends("q0")) == ["proponent", "opponent"]
    assert [entry.rank for rows in run.ends("q0").values() for entry in rows] == [*range(1, 13), *range(1, 13)]
    entries = make_payload(run)["queries"][0]["ranked"]
    assert [entry["end"] for entry in entries] == ["proponent"] * 12 + ["opponent"] * 12


def test_parts_of_examples_that_share_an_id_are_left_out_not_mixed(run_folder, tmp_path):
    run = Path(shutil.copytree(run_folder, tmp_path / "run"))
    table = pq.read_table(run / "examples.parquet").to_pylist()
    twin = table[0]["example_id"]
    table[1]["example_id"] = twin
    pq.write_table(pa.Table.from_pylist(table), run / "examples.parquet")
    assert any(example == twin for _, example in read_run(run_folder).tables.parts("components"))
    assert not any(example == twin for _, example in read_run(run).tables.parts("components"))


def said(folder) -> str:
    with pytest.raises(UserError) as error:
        report(folder)
    return str(error.value)


def test_a_folder_that_is_no_run_is_answered_with_what_to_type(tmp_path, run_folder):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.json").write_text("{}")
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "manifest.json").write_text("{}")
    assert "does not exist" in said(tmp_path / "nothing")
    assert "is a file" in said(tmp_path / "file.json")
    assert "vestige attribute" in said(tmp_path / "empty")
    assert "is an index" in said(tmp_path / "index")
    assert "--index" in said(tmp_path / "index")
    assert f"vestige report {run_folder}" in said(run_folder.parent)


def test_a_damaged_run_names_the_file_and_what_to_type(tmp_path):
    run = write_fixture_run(tmp_path / "run")
    (run / "queries.parquet").unlink()
    assert "no queries.parquet" in said(run)
    (run / "queries.parquet").write_bytes(b"PAR1 but not really")
    assert "queries.parquet cannot be read" in said(run)
    (run / "run.json").write_text("{")
    assert "run.json is not a run record" in said(run)
    (run / "run.json").write_text(json.dumps({"format": 2, "vestige": "9.1"}))
    assert "format 2" in said(run)


def test_a_table_without_a_needed_column_is_named(tmp_path):
    run = write_fixture_run(tmp_path / "run")
    table = pq.read_table(run / "scores.parquet")
    pq.write_table(table.drop_columns(["score"]), run / "scores.parquet")
    assert "lacks the columns score" in said(run)
