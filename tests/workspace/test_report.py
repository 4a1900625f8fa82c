"""A single run, served as its report: the page follows the run's files."""

import json
import shutil
import socket

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from tests.reports.fixture_run import write_fixture_run
from tests.workspace.served import serve, visit
from vestige.errors import UserError
from vestige.reports import render_page
from vestige.workspace import view


@pytest.fixture
def served(tmp_path):
    run = write_fixture_run(tmp_path / "run")
    return run, visit(run)


def rename_method(run, name: str) -> None:
    info = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(info | {"method": name}))


def test_the_page_follows_the_files_of_the_run(served):
    run, client = served
    first, version = client.get("/"), client.get("/version").text
    assert first.status_code == 200
    assert f'data-live="{version}"' in first.text
    rename_method(run, "another-method")
    assert client.get("/version").text != version
    assert "another-method" in client.get("/").text


def test_a_run_that_is_just_being_written_keeps_the_last_page(served):
    run, client = served
    first = client.get("/").text
    (run / "run.json").write_text("{")
    assert client.get("/").text == first


def test_a_run_that_is_gone_is_said_and_a_page_does_not_reload_for_it(served):
    run, client = served
    version = client.get("/version").text
    (run / "run.json").write_text("{")
    assert client.get("/version").text == version
    shutil.rmtree(run)
    for path in ("/", "/version"):
        answer = client.get(path)
        assert answer.status_code == 410
        assert "is gone" in answer.text


def test_a_broken_cell_is_answered_and_the_connection_stays(tmp_path):
    run = write_fixture_run(tmp_path / "run")
    table = parquet.read_table(run / "examples.parquet")
    cells = pa.array(["{"] * len(table), pa.string())
    broken = table.set_column(table.column_names.index("messages"), "messages", cells)
    parquet.write_table(broken, run / "examples.parquet")
    with pytest.raises(UserError, match=r"examples\.parquet, row 0: `messages` does not read"):
        serve(run)


def test_a_folder_that_is_not_there_and_a_taken_port_are_said(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        view(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        view(tmp_path / "file")
    run = write_fixture_run(tmp_path / "run")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="cannot be used"):
            view(run, taken.getsockname()[1])


def test_letters_that_turn_the_direction_of_writing_are_kept_inside_their_element(tmp_path):
    page = render_page(write_fixture_run(tmp_path / "run"))
    assert "body *:not(.piece) { unicode-bidi: isolate; }" in page
