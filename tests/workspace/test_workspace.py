"""A folder of results as the server lists, opens and compares it, and whom it answers."""

import html
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import vestige
from tests.reports.fixture_run import write_fixture_run
from tests.workspace.served import ORIGIN, PORT, TOKEN, serve, visit
from vestige.errors import UserError
from vestige.evaluate import Evaluation, EvaluationRow, write_evaluation
from vestige.storage import hold_folder
from vestige.workspace import Workspace, describe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs, a fix, a selection, an evaluation, and two damaged results."""
    folder = tmp_path_factory.mktemp("results")
    for number, name in enumerate(("one", "two")):
        write_fixture_run(folder / "runs" / name, seed=number, method=f"method-{number}")
    write_fixture_run(folder / ".hidden")
    vestige.demo(folder / "demo")
    rows = [{"id": f"row-{number}", "text": f"text {number}"} for number in range(9)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    vestige.select(data=str(folder / "rows.jsonl"), strategy="random", budget="3", out=folder / "selection")
    found = Evaluation(
        "overlap", "Overlap of <two> methods", (EvaluationRow("bm25", {"share": 0.25}, 1.5),), ("A note.",)
    )
    write_evaluation(found, folder / "overlap", {})
    for name, file in (("run", "run.json"), ("index", "manifest.json")):
        (folder / "damaged" / name).mkdir(parents=True)
        (folder / "damaged" / name / file).write_text("{")
    return folder


@pytest.fixture
def client(folder):
    return visit(folder)


def lines(client) -> dict[str, dict]:
    return {line["path"]: line for line in client.get("/api/list").json()["results"]}


def test_every_result_is_listed_with_its_kind_and_state(client):
    found = lines(client)
    kinds = {path: (line["kind"], line["state"]) for path, line in found.items()}
    assert kinds == {
        "damaged/index": ("index", "damaged"),
        "damaged/run": ("run", "damaged"),
        "demo/fix": ("fix", "finished"),
        "demo/run": ("run", "finished"),
        "overlap": ("evaluation", "finished"),
        "runs/one": ("run", "finished"),
        "runs/two": ("run", "finished"),
        "selection": ("selection", "finished"),
    }
    assert found["runs/two"]["method"] == "method-1"
    assert found["demo/run"]["seconds"] > 0
    assert "does not read as an index manifest" in found["damaged/index"]["error"]
    assert found["overlap"]["about"] == "Overlap of <two> methods"


def test_a_result_is_opened_with_its_facts_and_tables(client):
    opened = client.get("/api/open", params={"path": "overlap"}).json()
    assert opened["table"] == {"columns": ["method", "share", "seconds"], "rows": [["bm25", "0.25", "1.5"]]}
    assert "A note." in opened["text"]
    assert "made by" in client.get("/api/open", params={"path": "runs/one"}).json()["text"]
    damaged = client.get("/api/open", params={"path": "damaged/run"})
    assert damaged.status_code == 400
    assert "run.json" in damaged.json()["error"]


def test_a_name_that_is_no_utf_8_is_listed(tmp_path):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/bad-\xff")
    os.mkdir(folder)
    (Path(folder) / "run.json").write_text("{")
    (line,) = visit(tmp_path).get("/api/list").json()["results"]
    assert line["state"] == "damaged"


def test_what_only_has_the_name_of_a_file_does_not_hide_the_others(tmp_path):
    write_fixture_run(tmp_path / "run", tables=())
    (tmp_path / "other" / "folder.json").mkdir(parents=True)
    (tmp_path / "other" / "gone.json").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "other" / "pipe.json")
    assert [line["path"] for line in Workspace(tmp_path).results()] == ["run"]


def test_what_has_no_training_data_is_not_searched(client, folder, monkeypatch):
    for path in ("selection", "demo/fix", "runs"):
        assert "no training data" in client.get("/api/rows", params={"path": path}).json()["error"]
    monkeypatch.chdir(folder)
    assert "are not there" in client.get("/api/rows", params={"path": "demo/run"}).json()["error"]


def test_a_run_that_lacks_parts_is_unfinished_and_one_that_is_written_is_running(tmp_path):
    write_fixture_run(tmp_path / "begun", missing=["checks"])
    workspace = Workspace(tmp_path)
    (line,) = workspace.results()
    assert (line["state"], line["lacking"]) == ("unfinished", "trust checks")
    with hold_folder(tmp_path / "begun", "vestige attribute --out begun"), hold_folder(tmp_path / "new", "vestige new"):
        begun, new = workspace.results()
        assert (begun["state"], begun["command"]) == ("running", "vestige attribute --out begun")
        assert (new["path"], new["kind"], new["command"]) == ("new", "in the making", "vestige new")
        (tmp_path / "new").mkdir()
        assert "vestige new" in workspace.open("new")["text"]
    assert workspace.results()[0]["state"] == "unfinished"


@pytest.mark.parametrize(
    ("change", "error"), [({"format": 99}, "Update with"), ({"created": None}, "created"), ({"data": []}, "data")]
)
def test_a_record_that_does_not_read_is_listed_with_the_reason(tmp_path, change, error):
    path = write_fixture_run(tmp_path / "run", tables=()) / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    (line,) = Workspace(tmp_path).results()
    assert (line["kind"], line["state"]) == ("run", "damaged")
    assert error in line["error"]


def test_what_a_list_does_not_show_is_checked_when_the_run_is_opened(tmp_path):
    path = write_fixture_run(tmp_path / "run", tables=()) / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"distribution": {"q": float("nan")}}))
    workspace = Workspace(tmp_path)
    assert workspace.results()[0]["state"] == "finished"
    with pytest.raises(UserError, match="NaN"):
        workspace.open("run")


def test_a_report_leads_back_to_the_list_and_two_runs_are_compared(client):
    page = client.get("/page", params={"path": "runs/one"}).text
    assert '<a href="/">← All results</a>' in page
    compared = client.get("/page", params={"path": "runs/one", "compare": "runs/two"}).text
    assert '"names":["method-0","method-1"]' in compared
    refused = client.get("/version", params={"path": "runs/one", "compare": "demo/run"})
    assert refused.status_code == 410
    assert "no query in common" in refused.text


def test_500_runs_are_listed_quickly_and_read_once(tmp_path):
    first = write_fixture_run(tmp_path / "run-0", tables=(), method="first")
    for number in range(1, 500):
        (tmp_path / f"run-{number}").mkdir()
        shutil.copyfile(first / "run.json", tmp_path / f"run-{number}" / "run.json")
    workspace, begun = Workspace(tmp_path), time.monotonic()
    assert [line["method"] for line in workspace.results()] == ["first"] * 500
    assert time.monotonic() - begun < 5
    path, stat = first / "run.json", (first / "run.json").stat()
    path.write_text(path.read_text().replace('"first"', '"other"'))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert workspace.results()[0]["method"] == "first"
    os.utime(path)
    assert workspace.results()[0]["method"] == "other"


@pytest.mark.parametrize("path", ["..", "../..", "/etc", "runs/../..", "link", "runs/\0", "nowhere", "rows.jsonl"])
@pytest.mark.parametrize("place", ["/api/open", "/api/rows", "/page", "/version"])
def test_paths_from_the_browser_stay_in_the_folder(client, folder, tmp_path, place, path):
    link = folder / "link"
    if not link.is_symlink():
        link.symlink_to(write_fixture_run(tmp_path / "elsewhere"))
    answer = client.get(place, params={"path": path})
    assert answer.status_code in (400, 410)
    assert "There is no folder" in answer.text
    assert "link" not in lines(client)


def test_the_token_opens_and_becomes_a_cookie(folder):
    client = serve(folder)
    assert client.get("/").status_code == 403
    assert client.get("/?token=wrong").status_code == 403
    answer = client.get(f"/page?path=runs/one&token={TOKEN}", follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/page?path=runs%2Fone")
    cookie = answer.headers["set-cookie"].lower()
    assert f"vestige-{PORT}={TOKEN}" in cookie
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert client.get("/").status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1:8001", "127.0.0.1.evil.example:8000", ""]
)
def test_a_name_that_was_rebound_to_this_computer_is_turned_away(client, host):
    assert client.get("/api/list", headers={"host": host}).status_code == 403
    assert client.get("/api/list", headers={"host": f"127.0.0.1:{PORT}"}).status_code == 200


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_pages_of_other_sites_read_nothing(client, site):
    for path in ("/", "/api/list", "/page?path=runs/one"):
        assert client.get(path, headers={"sec-fetch-site": site}).status_code == 403
    assert client.get("/api/list", headers={"sec-fetch-site": "same-origin"}).status_code == 200


@pytest.mark.parametrize(
    "origin", [None, "null", "http://evil.example", "http://127.0.0.1:9999", "https://127.0.0.1:8000"]
)
def test_pages_of_other_sites_change_nothing(client, origin):
    own = {} if origin is None else {"origin": origin}
    for path in ("/api/ask", "/api/stop"):
        assert client.post(path, json={}, headers=own).status_code == 403
        assert client.get(path, headers={"origin": ORIGIN}).status_code == 405
    assert client.post("/api/stop", headers={"origin": ORIGIN}).status_code == 200


def test_every_answer_is_closed_to_frames_and_other_origins(client):
    for path in ("/", "/api/list", "/page?path=runs/one", "/api/open?path=..", "/nowhere", "/?token=wrong"):
        headers = client.get(path, headers={"origin": "http://evil.example"}).headers
        assert headers["content-security-policy"] == "frame-ancestors 'none'"
        assert headers["x-frame-options"] == "DENY"
        assert headers["cache-control"] == "no-store"
        assert not [name for name in headers if name.startswith("access-control")]
    page = html.unescape(client.get("/").text)
    assert "default-src 'none'; script-src 'sha256-" in page
    assert "://" not in page


def test_what_cannot_be_asked_is_refused_with_the_reason(client):
    def ask(**content):
        answer = client.post("/api/ask", json=content, headers={"origin": ORIGIN})
        assert answer.status_code == 400
        return answer.json()["error"]

    assert "is no index" in ask(path="runs/one", question="Why?")
    assert "Expected" in ask(question="Why?")
    assert "There is no folder" in ask(path="../x", question="Why?")
    assert "letters" in ask(path="runs/one", question="x" * 20_001)


def test_status_describes_what_the_workspace_lists(folder):
    assert "3 of 9" in describe(folder / "selection") or "random" in describe(folder / "selection")
    assert "without them" in describe(folder / "demo" / "fix")


@pytest.mark.slow
def test_without_the_extra_the_command_says_what_to_install(tmp_path):
    script = "import sys; sys.modules['starlette'] = None; from vestige.cli import main; main(['view', sys.argv[1]])"
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert 'Type: pip install "vestige[view]"' in done.stderr
