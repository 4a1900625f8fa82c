import http.client
import json
import shutil
import socket
from threading import Thread

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from tests.reports.browser import open_page
from tests.reports.fixture_run import write_fixture_run
from vestige.errors import UserError
from vestige.reports import make_server, render_page, view


@pytest.fixture
def served(tmp_path):
    run = write_fixture_run(tmp_path / "run")
    with make_server(run) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield run, server.server_address
        server.shutdown()
        thread.join()


def get(address, path: str, host: str | None = None) -> tuple[int, str]:
    connection = http.client.HTTPConnection(*address, timeout=120)
    connection.request("GET", path, headers={"Host": host} if host else {})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text


def rename_method(run, name: str) -> None:
    info = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(info | {"method": name}))


def test_the_page_follows_the_files_of_the_run(served):
    run, address = served
    (status, first), (_, version) = get(address, "/"), get(address, "/version")
    assert status == 200
    assert f'data-live="{version}"' in first
    rename_method(run, "another-method")
    assert get(address, "/version")[1] != version
    assert "another-method" in get(address, "/")[1]


def test_a_run_that_is_just_being_written_keeps_the_last_page(served):
    run, address = served
    first = get(address, "/")[1]
    (run / "run.json").write_text("{")
    assert get(address, "/") == (200, first)


def test_a_run_that_is_gone_is_said_and_a_page_does_not_reload_for_it(served):
    run, address = served
    version = get(address, "/version")[1]
    (run / "run.json").write_text("{")
    assert get(address, "/version") == (200, version)
    shutil.rmtree(run)
    for path in ("/", "/version"):
        status, said = get(address, path)
        assert status == 410
        assert "is gone" in said


def test_a_broken_cell_is_answered_and_the_connection_stays(tmp_path):
    run = write_fixture_run(tmp_path / "run")
    table = parquet.read_table(run / "examples.parquet")
    cells = pa.array(["{"] * len(table), pa.string())
    broken = table.set_column(table.column_names.index("messages"), "messages", cells)
    parquet.write_table(broken, run / "examples.parquet")
    with pytest.raises(UserError, match=r"examples\.parquet, row 0: `messages` does not read"):
        make_server(run)


def test_only_this_computer_and_only_the_report_is_served(served):
    _, address = served
    assert address[0] == "127.0.0.1"
    assert get(address, "/", host="evil.example")[0] == 403
    assert get(address, "/", host="localhost:1234")[0] == 200
    assert get(address, "/../run.json")[0] == 404


@pytest.mark.slow
def test_the_live_page_runs_without_errors(served, chromium):
    _, (host, port) = served
    page = open_page(chromium, f"http://{host}:{port}/")
    assert page.console == []
    assert len(page.all(name="card")) == 12


def test_a_folder_that_is_no_run_and_a_taken_port_are_said(tmp_path):
    with pytest.raises(UserError, match="not a run directory"):
        view(tmp_path)
    run = write_fixture_run(tmp_path / "run")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="cannot be used"):
            view(run, taken.getsockname()[1])


def test_letters_that_turn_the_direction_of_writing_are_kept_inside_their_element(tmp_path):
    page = render_page(write_fixture_run(tmp_path / "run"))
    assert "body *:not(.piece) { unicode-bidi: isolate; }" in page
