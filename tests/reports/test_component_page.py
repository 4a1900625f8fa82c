"""The page of a component search: every figure and table, what is held out marked as such, hostile names inert."""

import json

import pytest

from tests.reports.browser import open_page
from vestige.errors import UserError
from vestige.reports import render_page, report

HOSTILE = "</script><img src=x onerror=\"document.title='owned'\">"
TYPES = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm")


def estimate(value, half=0.1):
    return {"value": value, "interval": [max(value - half, 0), min(value + half, 1)]}


def difference(value, half):
    return {"value": value, "interval": [value - half, value + half]}


def representation(name, accuracy, against=None, numbers=100, opponent=False):
    return {
        "name": name,
        "accuracy": estimate(accuracy),
        "against_full": against,
        "agreement": None if opponent else estimate(0.9),
        "centred": None if opponent else estimate(0.8),
        "parameters": None if opponent else numbers / 1000,
        "backward": None if opponent else 0.5,
        "bytes": None if opponent else 4 * numbers,
        "seconds": None if opponent else 1.5,
        "opponent": opponent,
    }


def choice(accuracy):
    parts = [
        {
            "name": f"model.layers.{layer}.{kind}.weight",
            "type": kind,
            "layer": layer,
            "parameters": 10 if "norm" in kind else 120,
            "backward": 0.5,
            "accuracy": estimate(accuracy - 0.1 * layer),
            "agreement": 0.9,
            "centred": 0.8,
            "output_accuracy": None if "norm" in kind else 0.5,
            "self_similarity": None,
        }
        for layer in range(3)
        for kind in TYPES
    ]
    names, sizes = [one["name"] for one in parts], [one["parameters"] for one in parts]
    search = {
        "path": names,
        "accuracy_along_path": [accuracy] * len(parts),
        "agreement_along_path": [None, *[0.9] * (len(parts) - 2), 1.0],
        "parameters_along_path": [sum(sizes[: place + 1]) for place in range(len(sizes))],
    }
    wrong = {
        "query": HOSTILE,
        "picked": "row-3",
        "similarity": 0.4,
        "originals": [],
        "original_similarity": None,
        "rank_by_bm25": 7,
        "query_tokens": 5,
        "picked_tokens": 6,
        "original_tokens": [],
    }
    return {
        "original_listed": 0.75,
        "original_put_there": 0,
        "rank_of_original_by_bm25": {"1": 2, "2": 1, "7": 1},
        "representations": [
            representation("full gradient", accuracy, numbers=1000),
            representation("best component, held out", accuracy, difference(0.05, 0.02)),
            representation("greedy for accuracy, held out", accuracy, difference(0.0, 0.1)),
            representation("greedy for agreement, held out", accuracy, difference(-0.2, 0.1)),
            representation("projection 16", accuracy, difference(0.0, 0.1), 16),
            representation("projection 16, as published", accuracy, difference(0.0, 0.1), 16),
            representation("bm25 of the prompts", accuracy, difference(0.05, 0.02), opponent=True),
            representation("random", 0.2, difference(-0.5, 0.1), opponent=True),
        ],
        "components": parts,
        "searches": {"accuracy": search, "agreement": search},
        "wrong": [wrong],
    }


@pytest.fixture
def searched(tmp_path):
    """What `vestige evaluate components` leaves, written without any model."""
    folder = tmp_path / "components-run"
    folder.mkdir()
    found = {
        "kind": "components",
        "title": "Originals of 4 queries among 20 examples (5, all candidates), 15 components",
        "rows": [],
        "notes": ["Held out: <sets>."],
        "command": "vestige evaluate components --model some/tiny-model --out components-run",
        "model": "some/tiny-model",
        "passes": {"backward_passes": 24, "published_to_ours": 5.0, "gradient_seconds": 2.5},
        "candidates": {"5": choice(0.75), "all": choice(0.5)},
    }
    (folder / "components.json").write_text(json.dumps(found))
    lines = ["query,candidate,right,component,cosine"]
    for candidate in range(2):
        for one in found["candidates"]["5"]["components"]:
            lines.append(f'"q,1",{candidate},{1 - candidate},{one["name"]},{0.1 * candidate}')
    (folder / "self_similarity.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.slow
def test_the_page_has_every_figure_and_table_of_the_study(searched):
    page = report(searched).read_text()
    for title in (
        "Parameters of every component",
        "Accuracy of every component",
        "Agreement of every component with the full gradient",
        "Accuracy by depth: attention",
        "Accuracy by depth: feed-forward",
        "Agreement by depth: attention",
        "Mean accuracy by depth",
        "Accuracy by number of parameters",
        "Over the layers: q,1",
        "Greedy paths: accuracy",
        "Greedy paths: agreement",
        "Types of components, on average",
        "Wrong decisions of the full gradient: 1",
    ):
        assert f"<h2>{title}</h2>" in page
    assert "nan" not in page.lower()
    assert "not listed" in page
    assert "<dd>tiny-model" in page
    assert "<span>--out components-run</span>" in page
    assert "Believe the rows that say <b>held out</b>" in page
    assert "Held out: &lt;sets&gt;." in page


@pytest.mark.slow
def test_a_set_is_called_better_or_worse_only_where_the_interval_says_so(searched, tmp_path, chromium):
    page = open_page(chromium, report(searched, tmp_path / "page.html").as_uri())
    shown = page.all("li", "check")[:5]
    verdicts = [each.text.split() for each in shown]
    assert [("better" in words, "worse" in words) for words in verdicts] == [
        (False, False),
        (True, False),
        (False, False),
        (False, True),
        (True, False),
    ]
    assert "warn" in shown[4].classes, "words alone do better than the gradient: nothing to be glad of"


@pytest.mark.slow
def test_hostile_names_stay_texts_and_the_link_chooses_the_candidates(searched, tmp_path, chromium):
    address = report(searched, tmp_path / "page.html").as_uri()
    for words in ("5", "all"):
        page = open_page(chromium, f"{address}#candidates={words}")
        parts = [each for each in page.all("div", "choice") if "hidden" not in each.attributes]
        assert [each.attributes["data-candidates"] for each in parts] == [words]
    assert page.console == []
    assert page.all("img") == []
    assert len(page.all("script")) == 1
    assert page.all("title")[0].text.startswith("Which components")
    assert HOSTILE in [each.text for each in page.all("th")]


@pytest.mark.slow
def test_a_damaged_result_is_reported_and_a_served_one_is_live(searched):
    assert 'role="status">live' in render_page(searched, live="1")
    (searched / "components.json").write_text('{"candidates": {}}')
    with pytest.raises(UserError, match=r"components\.json or self_similarity\.csv"):
        report(searched)


@pytest.mark.slow
def test_bars_have_their_names_kinds_are_legends_and_what_is_unknown_is_left_out(searched):
    found = json.loads((searched / "components.json").read_text())
    for each in found["candidates"].values():
        for one in each["components"]:
            one["name"] = f"<b>{one['name']}"
            one["agreement"] = None
        each["components"][0]["accuracy"]["value"] = None
    (searched / "components.json").write_text(json.dumps(found))
    (searched / "self_similarity.csv").unlink()
    page = report(searched).read_text()
    accuracy = page[page.index("<h2>Accuracy of every component</h2>") :].partition("</figure>")[0]
    assert accuracy.count("<title>&lt;b&gt;model.layers") == 3 * len(TYPES) - 1
    assert [f"</i>{kind}</span>" in accuracy for kind in ("attention", "feed-forward", "others")] == [True] * 3
    assert "Agreement of every component" not in page
    assert "<b>model.layers" not in page
    assert "nan" not in page.lower()
    assert 'd="M8 4L2 8L8 12"' in page, "beyond the ends: an arrow"
