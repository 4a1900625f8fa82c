"""Two runs in one page: what is said of the other one, and which pairs are refused."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.reports.fixture_run import write_fixture_run
from vestige.errors import UserError
from vestige.reports import make_comparison, make_payload, read_run, report


def change_table(run, name, **columns):
    rows = [row | columns for row in pq.read_table(run / f"{name}.parquet").to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows), run / f"{name}.parquet")


def test_ranks_answers_and_unlisted_examples_of_the_other_run_are_there(run_folder, tmp_path):
    other = write_fixture_run(tmp_path / "other", seed=1, method="grad-cos")
    change_table(other, "queries", completion="Another answer.", tokens=None)
    mine, theirs = read_run(run_folder), read_run(other)
    data = json.loads(json.dumps(make_payload(mine, make_comparison(mine, theirs))))["other"]
    assert data["names"] == ["influence", "grad-cos"]
    first = data["queries"]["q0"]
    assert [entry["row"] for entry in first["ranked"]] == [
        entry.row for rows in theirs.ends("q0").values() for entry in rows
    ]
    assert first["ranked"][0]["strength"] == 100
    assert "".join(first["text"]["pieces"]).endswith("Another answer.")
    tops = [{entry.row for entry in run.top("q0")} for run in (mine, theirs)]
    assert first["shared"] == len(tops[0] & tops[1])
    assert set(data["examples"]) == {str(row) for row in theirs.tables.examples if row not in mine.tables.examples}


def test_runs_of_one_method_and_model_have_the_names_of_their_folders(run_folder, tmp_path):
    other = write_fixture_run(tmp_path / "second")
    data = make_comparison(read_run(run_folder), read_run(other))
    assert data["names"] == ("demo-run", "second")
    assert data["queries"]["q0"]["text"] is None, "the same answer is not shown twice"


def test_other_data_other_questions_and_other_pages_are_refused(run_folder, tmp_path):
    data = {"name": "x.jsonl", "fingerprint": "sha256:00", "examples": 3}
    other = write_fixture_run(tmp_path / "data", data=data)
    with pytest.raises(UserError, match=r"different data.*x\.jsonl"):
        report(run_folder, tmp_path / "page.html", compare=other)
    other = write_fixture_run(tmp_path / "queries")
    change_table(other, "queries", query_id="elsewhere")
    change_table(other, "scores", query_id="elsewhere")
    with pytest.raises(UserError, match="no query in common"):
        report(run_folder, tmp_path / "page.html", compare=other)
    other = write_fixture_run(tmp_path / "question")
    change_table(other, "queries", prompt="Something else?", tokens=None)
    with pytest.raises(UserError, match="another question"):
        report(run_folder, tmp_path / "page.html", compare=other)
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "components.json").write_text("{}")
    with pytest.raises(UserError, match="ranks no training examples"):
        report(tmp_path / "search", compare=run_folder)
    assert not (tmp_path / "page.html").exists()
