"""The page opened in headless Chromium; without one these tests are skipped and the summary says so."""

import math

import pytest

from tests.reports.browser import Page, open_page
from tests.reports.fixture_run import write_fixture_run
from vestige.reports import report


@pytest.fixture
def opened(run_folder, tmp_path, chromium):
    page = report(run_folder, tmp_path / "page.html")
    return lambda choice="": open_page(chromium, page.as_uri() + choice)


def scores(page: Page) -> list[float]:
    return [float(found.text.replace("−", "-")) for found in page.all("span", "score")]


@pytest.mark.slow
def test_the_page_opens_without_errors_and_shows_everything(opened):
    page = opened()
    assert page.console == []
    assert len(page.all("li", "card")) == 12
    assert scores(page) == sorted(scores(page)[:6], reverse=True) + sorted(scores(page)[6:])
    titles = [found.text for found in page.all("h2")]
    for title in ("How far to trust it", "Among all training examples", "Where in the model", "By source"):
        assert title in titles
    assert "Why is the sky blue?" in page.all("li", "card")[0].text


@pytest.mark.slow
def test_the_link_chooses_query_filters_and_example(opened):
    page = opened("#query=q1&end=proponent&source=literature&text=hobbit&min=0.1&example=proponent-1")
    assert page.console == []
    (card,) = page.all("li", "card")
    assert "selected" in card.classes
    assert "100% of the answer verbatim" in card.text
    assert "The Hobbit was written by" in page.by_id("answer").text
    underlined = "".join(found.text for found in page.all("span", "match") if found.text != "underline")
    assert underlined.count("written by J. R. R. Tolkien") == 2, "in the answer and in the example"
    assert "all tokens sum to +0.171" in card.text


@pytest.mark.slow
def test_the_heatmap_sums_to_the_score(opened):
    for choice, count in (("#query=q2", 12), ("#query=q2&example=opponent-1", 1)):
        page = opened(choice)
        panel = page.by_id("heatmap")
        total, score = (float(panel.attributes[name]) for name in ("data-sum", "data-score"))
        assert total == pytest.approx(score, rel=1e-4)
        cells = [found.attributes["data-tip"].split("\n") for found in page.all("rect", "cell")]
        assert len(cells) == 12 * 9 + 2
        shown = math.fsum(float(value.replace("−", "-")) for _, value in cells)
        assert shown == pytest.approx(score, abs=len(cells) * 5e-4), f"the printed cells of {count} examples"


@pytest.mark.slow
def test_hostile_training_text_is_inert(tmp_path, chromium):
    hostile = "</script><img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
    run = write_fixture_run(tmp_path / "run", hostile=hostile)
    page = open_page(chromium, report(run).as_uri())
    assert page.console == []
    assert page.all("img") == []
    assert len(page.all("script")) == 2
    assert page.all("title")[0].text.startswith("The training data behind")
    assert "</script><img src=x" in page.all("li", "card")[0].text


@pytest.mark.slow
def test_a_run_without_token_and_component_tables_says_how_to_get_them(tmp_path, chromium):
    run = write_fixture_run(tmp_path / "run", tables=())
    page = open_page(chromium, report(run).as_uri())
    assert page.console == []
    assert len(page.all("li", "card")) == 12
    assert "--tokens" in page.all("p", "legend")[0].text
    assert "no scores per component" in page.by_id("evidence").text
    assert page.all("rect", "cell") == []
