"""The three proofs of an answer on the page, in a real browser."""

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from tests.reports.browser import Visit
from tests.reports.fixture_run import write_fixture_run
from vestige.reports import make_payload, read_run, report

HOSTILE = "<img src=x onerror=alert(1)>"


def line(query, **changes):
    given = {"query_id": query, "span": 1, "start": 9, "text": HOSTILE, "tokens": 5, "rarity": 9.0, "occurrences": 3}
    given |= {"rows": 2, "example_id": "science-0000", "row": 0, "position": 8, "source": None, "before": "<b>before"}
    return given | {"after": "after</b>", "extraction": 1.0, "loss": 0.1, "counterfactual": None} | changes


@pytest.fixture
def folder(tmp_path):
    run = write_fixture_run(tmp_path / "run")
    parquet.write_table(pa.Table.from_pylist([line("q0"), line("q0", row=1, extraction=0.5)]), run / "verbatim.parquet")
    return run


def test_a_run_without_the_search_has_no_proofs(tmp_path):
    assert make_payload(read_run(write_fixture_run(tmp_path / "run")))["queries"][0]["proofs"] is None


@pytest.mark.slow
def test_the_proofs_stand_below_the_conclusion_and_text_is_no_markup(folder, tmp_path, chromium):
    with Visit(chromium, report(folder, tmp_path / "page.html")) as visit:
        names = "[...document.querySelectorAll('.proofs dt')].map((part) => part.innerText)"
        assert visit.evaluate(names) == ["Moved it", "States it", "Memorized"]
        visit.click(".proofs summary")
        assert HOSTILE in visit.text(".proofs mark")
        assert "…<b>before" in visit.text(".proofs li")
        assert visit.count(".proofs img") == 0
        visit.click(".proofs .link")
        assert "science-0000" in visit.text(".card.selected")
        assert visit.errors == []
