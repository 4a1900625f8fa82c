"""The page used: keys, clicks that filter, groups of several queries, two runs side by side; in a real browser."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.reports.browser import Visit
from tests.reports.fixture_run import SYSTEM, write_fixture_run
from vestige.reports import make_payload, read_run, report

pytestmark = pytest.mark.slow


@pytest.fixture
def visit(run_folder, tmp_path, chromium):
    page = report(run_folder, tmp_path / "page.html")
    with Visit(chromium, page) as visit:
        yield visit
        assert visit.errors == []


def test_everything_that_is_used_has_a_name_and_no_id_is_there_twice(visit):
    nameless = """[...document.querySelectorAll('button, input, select, summary, svg, [role]')].filter((part) =>
        !part.hidden && !part.getAttribute('aria-label') && !part.getAttribute('aria-labelledby')
        && !part.textContent.trim() && !(part.labels || []).length && !['drawing', 'tip'].includes(part.id)).length"""
    visit.click("details.trust > summary")
    visit.click(".about > summary")
    assert visit.evaluate(nameless) == 0
    ids = visit.evaluate("[...document.querySelectorAll('[id]')].map((part) => part.id)")
    assert len(ids) == len({*ids})


def test_ids_in_the_conclusion_open_their_examples(visit):
    assert visit.text(".conclusion .link") == "science-0000"
    visit.click(".conclusion .link")
    assert address(visit) == "#query=q0&example=proponent-1"
    assert "science-0000" in visit.text(".card.selected")


def address(visit: Visit) -> str:
    return visit.evaluate("decodeURIComponent(location.hash.replaceAll('+', ' '))")


def chips(visit: Visit) -> list[str]:
    return visit.evaluate("[...document.querySelectorAll('.chips .chip')].map((chip) => chip.innerText)")


def test_question_answer_conclusion_and_three_examples_are_above_the_fold(visit):
    bottoms = visit.evaluate(
        "['.turn.of-answer', '.conclusion', 'details.trust', '.card:nth-child(3)'].map((part) => "
        "document.querySelector(part).getBoundingClientRect().bottom)"
    )
    assert bottoms == sorted(bottoms)
    assert bottoms[-1] <= 900
    assert visit.evaluate("document.querySelector('.about').open") is False
    assert visit.count("details.trust[open]") == 0
    visit.click("details.trust > summary")
    assert visit.count("details.trust[open] .check") == 6


def test_keys_move_between_examples_and_queries(visit):
    visit.press("j", "j", "k", "j")
    assert address(visit) == "#query=q0&example=proponent-2"
    visit.press("]", "]", "[")
    assert address(visit) == "#query=q1"
    for _ in range(7):
        visit.press("j")
    assert address(visit) == "#query=q1&example=proponent-7"
    assert "#7" in visit.text(".card.selected")
    assert visit.evaluate("document.querySelector('.card.selected').getBoundingClientRect().bottom <= innerHeight")


def test_keys_search_help_and_clear(visit):
    visit.press("/", *"sky")
    assert address(visit) == "#query=q0&text=sky"
    assert visit.count(".card") < 12
    visit.press("Escape")
    assert visit.count(".card") == 12
    visit.evaluate("document.activeElement.blur()")
    visit.press("?")
    assert "next, previous example" in visit.text("#help[open]")
    visit.press("j")
    assert address(visit) == "#query=q0"


def test_a_cell_a_tick_a_token_and_a_source_filter_and_a_chip_clears(visit):
    for part, chip in (
        ("svg .cell", "acts in"),
        ("svg .tick", "score"),
        (".piece[data-token]", "token"),
        (".groups .link", ""),
    ):
        visit.click(part, 40 if part == "svg .cell" else 0)
        (shown,) = chips(visit)
        assert shown.startswith(chip)
        assert visit.text("#status").split()[0] != "24"
        visit.click(".chips .chip")
        assert chips(visit) == []
        assert visit.text("#status") == "24 of 24 listed examples shown"


def test_a_tick_keeps_its_example_and_a_cell_those_that_act_there(visit):
    visit.click("svg .tick", 3)
    assert visit.count(".card.selected") == 1
    visit.press("Escape")
    visit.click("svg .cell", 60)
    shown = int(visit.text("#status").split()[0])
    assert 0 < shown < 24


def test_sources_of_chosen_queries_are_added_up(run_folder, visit):
    queries = make_payload(read_run(run_folder))["queries"]
    visit.click(".queries input", 0)
    visit.click(".queries input", 2)
    assert "Over the 2 chosen queries" in visit.text(".groups")
    assert json.loads(address(visit).split("with=")[1]) == ["q0", "q2"]
    lifts = [{each["source"]: each["influence"] / each["rows"] for each in queries[place]["lift"]} for place in (0, 2)]
    first = visit.text(".groups tbody tr").replace("\n", "").split("\t")
    assert float(first[-1].strip("×")) == pytest.approx(np.mean([each[first[0]] for each in lifts]), abs=0.06)


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory):
    return write_fixture_run(tmp_path_factory.mktemp("chat") / "run", chat=True)


def test_turns_are_bubbles_and_the_shared_system_prompt_is_shown_once(chat_folder, tmp_path, chromium):
    with Visit(chromium, report(chat_folder, tmp_path / "page.html")) as visit:
        assert visit.text(".answer .system summary") == "System prompt of all queries and examples"
        visible = "[...document.querySelectorAll('#queries, .text')].map((part) => part.innerText).join()"
        assert SYSTEM not in visit.evaluate(visible)
        assert visit.count(".answer .turn") == 2
        assert visit.count(".card .turn.of-prompt") == visit.count(".card .turn.of-answer") == 12
        visit.click(".answer .system summary")
        assert SYSTEM in visit.text(".answer .system")
        assert visit.errors == []


def test_a_run_without_some_parts_names_them_and_the_command(tmp_path, chromium):
    run = write_fixture_run(tmp_path / "run", tables=(), missing=["checks", "self_influence", "tokens"])
    with Visit(chromium, report(run)) as visit:
        shown = visit.text(".missing")
        assert "trust checks, self-influence and scores of tokens" in shown
        assert "vestige attribute --index demo/index" in shown
        assert "--tokens" not in visit.text(".legend"), "they are on their way"


def test_two_runs_side_by_side(run_folder, tmp_path, chromium):
    other = write_fixture_run(tmp_path / "other", seed=1, method="grad-cos")
    page = report(run_folder, tmp_path / "page.html", compare=other)
    mine, theirs = ([entry.row for entry in read_run(run).top("q0")] for run in (run_folder, other))
    with Visit(chromium, page) as visit:
        assert f"influence and grad-cos share {len({*mine} & {*theirs})} of the first 10" in visit.text(".comparison")
        assert f"grad-cos: #{theirs.index(mine[0]) + 1}" in visit.text(".card")
        visit.click(".comparison button", 1)
        assert visit.count(".sides") == 2
        moved = visit.evaluate(
            "[...document.querySelectorAll('.sides section:first-child .moved')].map((mark) => mark.innerText)"
        )
        change = theirs.index(mine[0])
        assert moved[0] == (f"▲ {change}" if change else "=")
        assert visit.errors == []


def test_a_page_of_100_queries_at_k_50_opens_quickly(tmp_path, chromium):
    run = write_large_run(tmp_path / "run")
    page = report(run)
    assert page.stat().st_size < 25e6
    with Visit(chromium, page) as visit:
        assert visit.count(".queries li") == 100
        assert visit.seconds < 6, "2 s where no other tests run; see docs"


def write_large_run(folder):
    """A run of 100 queries, each with 50 proponents and 50 opponents of 210 components, without token scores."""
    draw = np.random.default_rng(0)
    write_fixture_run(folder, tables=())
    names = [f"model.layers.{layer}.{kind}.weight" for layer in range(30) for kind in TYPES]
    example, query = (pq.read_table(folder / f"{name}.parquet").to_pylist()[0] for name in ("examples", "queries"))
    examples = [example | {"example_id": f"e{row}", "row": row} for row in range(1000)]
    queries = [query | {"query_id": f"q{row}", "row": row} for row in range(100)]
    scores, parts = [], []
    for each in queries:
        rows = draw.permutation(1000)[:100]
        values = np.sort(draw.normal(0, 1, 100))[::-1]
        for place, (row, value) in enumerate(zip(rows.tolist(), values.tolist(), strict=True)):
            end, rank = ("proponent", place + 1) if place < 50 else ("opponent", 100 - place)
            pair = {"query_id": each["query_id"], "example_id": f"e{row}"}
            scores.append({**pair, "end": end, "rank": rank, "row": row, "score": value, "percentile": 50.0})
            shares = draw.dirichlet(np.ones(len(names))) * value
            parts += [{**pair, "component": name, "score": share} for name, share in zip(names, shares, strict=True)]
    tables = {"examples": examples, "queries": queries, "scores": scores, "components": parts}
    for name, content in tables.items():
        pq.write_table(pa.Table.from_pylist(content), folder / f"{name}.parquet")
    info = json.loads((folder / "run.json").read_text())
    info |= {"components": names, "distribution": {}, "groups": {}}
    (folder / "run.json").write_text(json.dumps(info))
    return folder


TYPES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
