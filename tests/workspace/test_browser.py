"""The workspace used in a real browser: `vestige view` of more than 50 results, with a question asked of an index."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import httpx2
import pyarrow.parquet as parquet
import pytest

import vestige
from tests.reports.browser import Visit
from tests.workshop import furnish

pytestmark = pytest.mark.slow
QUESTION = "Why is the sky blue?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = furnish(tmp_path_factory.mktemp("workspace"))
    both = {"model": str(folder / "tiny-model"), "data": str(folder / "train.jsonl")}
    vestige.index(**both, out=folder / "idx")
    vestige.train(**both, out=folder / "trained", epochs=2)
    vestige.bank(**both, queries=str(folder / "train.jsonl"), out=folder / "bank", subsets=2, seeds=1, epochs=1)
    vestige.audit(**both, out=folder / "audit", measures=["loss"])
    for method in ("bm25", "random"):
        asked = {"data": both["data"], "queries": both["data"], "method": method, "dense": True}
        vestige.attribute(**asked, out=folder / "words" / method)
    for number in range(50):
        shutil.copytree(folder / "words" / "bm25", folder / "many" / f"run-{number:02d}")
    (folder / "torn").mkdir()
    (folder / "torn" / "run.json").write_text("{")
    return folder


@contextmanager
def viewing(folder: Path, *more: str):
    """The address of `vestige view`, as it prints it; Ctrl-C ends it."""
    command = [sys.executable, "-m", "vestige", "view", str(folder), *more]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as server:
        line = server.stderr.readline()
        try:
            yield re.search(r"http://\S+", line)[0]
        finally:
            server.send_signal(signal.SIGINT)
            assert server.wait(20) == 0
            assert server.stderr.read().endswith("Closed.\n")


@pytest.fixture(scope="module")
def address(folder):
    with viewing(folder, "--index", str(folder / "idx")) as address:
        yield address


@pytest.fixture
def visit(address, chromium):
    with Visit(chromium, address) as visit:
        visit.wait("document.querySelectorAll('#lines tr').length")
        yield visit
        assert visit.errors == []


def go(visit: Visit, view: str, path: str) -> None:
    visit.evaluate(f"location.hash = 'view={view}&path={path}'")


def test_results_are_listed_filtered_sorted_and_opened_by_key(visit):
    assert visit.evaluate("location.search") == ""
    assert visit.count("#lines tr") == 57
    kinds = visit.text("#kinds").replace("\n", " ")
    assert kinds.split() == ["All", "57", "audit", "1", "bank", "1", "index", "1", "run", "53", "training", "1"]
    assert "run.json is not a run record" in visit.text("tr.damaged small")
    visit.press("/")
    visit.press(*"many run-1")
    visit.wait("document.querySelectorAll('#lines tr').length === 10")
    shown = visit.evaluate("[...document.querySelectorAll('#lines tr')].map((row) => row.dataset.path)")
    assert all(path.startswith("many/run-1") for path in shown)
    visit.press("Escape", "Escape")
    visit.click("th.path button")
    assert visit.evaluate("document.querySelector('#lines tr').dataset.path") == "audit"
    visit.press("j", "j", "j", "k", "k", "Enter")
    visit.wait("location.pathname === '/page'")
    assert "audit" in visit.evaluate("location.search")
    visit.click(".eyebrow a")
    visit.wait("document.querySelectorAll('#lines tr').length === 57")


def test_two_runs_are_compared_and_those_of_other_data_are_refused(visit):
    for name in ("words/bm25", "words/random"):
        visit.click(f'tr[data-path="{name}"] input')
    visit.click("#compare button")
    visit.wait("location.pathname === '/page' && document.querySelector('.comparison')")
    assert "bm25 and random share" in visit.text(".comparison")


def test_training_data_are_searched_with_the_score_of_each_row(visit, folder):
    visit.evaluate("scrollTo({top: 1000, behavior: 'instant'})")
    go(visit, "rows", "words/bm25")
    visit.wait("document.querySelectorAll('#rows .card').length === 12")
    assert visit.evaluate("scrollY") == 0
    visit.evaluate("document.querySelector('#main [type=search]').focus()")
    visit.press(*"CAPITAL of")
    visit.wait("document.querySelectorAll('#rows .card').length === 2")
    assert visit.evaluate("document.querySelector('#rows mark').innerText") == "capital of"
    scores = vestige.Scores.open(folder / "words" / "bm25").dense_of("pair-2")
    visit.evaluate(
        "(s => { s.value = 'pair-2'; s.dispatchEvent(new Event('change')); })(document.querySelectorAll('select')[0])"
    )
    visit.evaluate(
        "(s => { s.value = 'low'; s.dispatchEvent(new Event('change')); })(document.querySelectorAll('select')[1])"
    )
    visit.wait("document.querySelector('#rows .rank').innerText === 'row 3'")
    shown = visit.evaluate("[...document.querySelectorAll('#rows .score')].map((each) => Number(each.innerText))")
    assert shown == pytest.approx([scores[3], scores[2]], abs=0.05)


def test_a_late_answer_to_an_earlier_choice_is_not_shown(visit):
    go(visit, "rows", "words/bm25")
    visit.wait("document.querySelectorAll('#rows .card').length === 12")
    visit.evaluate(
        "(() => { const fetched = window.fetch; window.answered = 0; window.fetch = async (address, options) => {"
        " const answer = await fetched(address, options);"
        " if (String(address).includes('order=high')) await new Promise((done) => setTimeout(done, 1000));"
        " if (String(address).includes('/api/rows')) setTimeout(() => { window.answered += 1; }, 300);"
        " return answer; }; })()"
    )
    choose = "(s => { s.value = '%s'; s.dispatchEvent(new Event('change')); })(document.querySelectorAll('select')[1])"
    visit.evaluate(choose % "high")
    visit.evaluate(choose % "low")
    visit.wait("window.answered === 2")
    shown = visit.evaluate("[...document.querySelectorAll('#rows .score')].map((each) => Number(each.innerText))")
    assert shown == sorted(shown)


def test_other_results_show_their_facts_and_a_training_its_loss(visit):
    go(visit, "open", "trained")
    visit.wait("document.querySelector('.curve .loss')")
    assert "checkpoints" in visit.text(".open-facts")
    go(visit, "open", "bank")
    visit.wait("document.querySelector('h2').innerText === 'bank'")
    assert "2 of 2" in visit.text(".open-facts")
    go(visit, "rows", "idx")
    visit.wait("document.querySelectorAll('#rows .card').length === 12")


def test_a_question_is_answered_with_its_sources_and_becomes_a_run(visit, folder):
    go(visit, "ask", "idx")
    visit.wait("document.querySelector('textarea')")
    visit.press(*QUESTION)
    visit.press("Enter")
    visit.wait("document.querySelectorAll('.sources .card').length === 10")
    visit.wait("document.getElementById('stop').hidden")
    asked = folder / "questions" / "why-is-the-sky-blue"
    vestige.attribute(QUESTION, index=folder / "idx", out=folder / "typed")
    for name in ("scores", "examples", "queries", "components"):
        assert parquet.read_table(asked / f"{name}.parquet").equals(
            parquet.read_table(folder / "typed" / f"{name}.parquet")
        )
    answer = vestige.Scores.open(asked).query(0).answer
    assert visit.evaluate("document.querySelector('#answer .of-answer .words').textContent") == answer
    records = [json.loads((run / "run.json").read_text()) for run in (asked, folder / "typed")]
    assert [record["missing"] for record in records] == [[], []]
    assert {**records[0]["config"], "out": ""} == {**records[1]["config"], "out": ""}
    visit.click(".asked-run a")
    visit.wait("location.pathname === '/page' && document.querySelectorAll('.card').length")


def test_one_question_at_a_time_streams_its_answer_and_can_be_stopped(address, folder):
    origin = address.split("/?")[0]
    with httpx2.Client(base_url=origin, follow_redirects=True, timeout=60, headers={"origin": origin}) as client:

        def ask(question: str) -> httpx2.Response:
            return client.post("/api/ask", json={"path": "idx", "question": question})

        def events() -> list[dict]:
            return [json.loads(line) for line in client.get("/api/events").text.splitlines()]

        client.get(address)
        events()  # until the model is loaded
        assert ask("What do bees make? Say it again!").json()["path"] == "questions/what-do-bees-make-say-it-again"
        assert "Another question is being answered" in ask("And now?").json()["error"]
        found = events()
        answers = [event["answer"] for event in found if "answer" in event]
        assert len(answers) > 8
        assert all(answers[-1].startswith(answer.rstrip("\ufffd")) for answer in answers)
        assert found[-1] == {"over": True}
        assert ask("What do bees make? Say it again!").json()["path"].endswith("-2")
        client.post("/api/stop")
        assert events()[-1]["error"].startswith("Stopped.")
        assert ask("train.jsonl").status_code == 200
        assert "name of a file" in events()[-1]["error"]
        assert not (folder / "questions" / "train-jsonl").exists()


LOSES_INTERRUPTS = """
import time
from types import SimpleNamespace
import vestige.methods
from vestige.workspace import answer_questions

def score(settings, **_):
    for _ in range(3):
        try:
            time.sleep(20)
        except KeyboardInterrupt:
            pass

vestige.methods.attribute = SimpleNamespace(run=score)
answer_questions()
"""


def test_a_stop_is_remembered_where_its_interrupt_is_lost(folder):
    """Once, twice and three times: it comes again each second, and is not forgotten at the end."""
    command = [sys.executable, "-c", LOSES_INTERRUPTS]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        for number in range(2):
            process.stdin.write(json.dumps([str(folder / "idx"), "Why?", str(folder / f"lost-{number}")]) + "\n")
            process.stdin.flush()
            while json.loads(process.stdout.readline()) != {"stage": "Answering"}:
                pass
            time.sleep(0.5)
            begun = time.monotonic()
            process.send_signal(signal.SIGINT)
            assert json.loads(process.stdout.readline())["error"].startswith("Stopped.")
            assert time.monotonic() - begun < 10
        process.send_signal(signal.SIGINT)  # nothing is asked: it waits for more
        time.sleep(0.5)
        assert process.poll() is None
        process.stdin.close()
        assert process.wait(20) == 0


def test_a_foreign_page_neither_reads_nor_asks(address, chromium, tmp_path):
    origin = address.split("/?")[0]
    (tmp_path / "page.html").write_text(
        f"""<script>
        const found = {{}};
        const post = {{method: "POST", mode: "no-cors", body: JSON.stringify({{path: "idx", question: "Why?"}})}};
        (async () => {{
            for (const path of ["/api/list", "/"])
                found[path] = await fetch("{origin}" + path, {{credentials: "include"}}).then(() => "read", () => "no");
            await fetch("{origin}/api/ask", {{credentials: "include", ...post}}).catch(() => null);
            found.done = true;
        }})();
        </script>"""
    )
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as foreign, Visit(chromium, address) as visit:
        Thread(target=foreign.serve_forever, daemon=True).start()
        visit.wait("document.querySelectorAll('#lines tr').length")
        visit.open(f"http://127.0.0.1:{foreign.server_address[1]}/page.html")
        assert visit.wait("found.done && found") == {"/api/list": "no", "/": "no", "done": True}
        visit.open(origin)
        visit.wait("document.querySelectorAll('#lines tr').length")
        visit.evaluate("fetch('/api/events').then((answer) => answer.text()).then((text) => (window.events = text))")
        assert '"question"' in visit.wait("window.events")
        assert "Why?" not in visit.evaluate("window.events")
        foreign.shutdown()
