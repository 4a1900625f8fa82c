"""A measure is one file and an entry point: settings, evidence, record, judgement and page take the rest from it."""

import json
import sys
from importlib.metadata import EntryPoint, EntryPoints

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.measures.audited import QUESTIONS, questions, simple
from vestige import registry
from vestige.cli import main
from vestige.errors import SpecError
from vestige.measures import MEASURES, Measure, describe_measure, measure, measure_table
from vestige.reports import report

THEIRS = """
from vestige.measures import measure


@measure("first_choice", "share of the target tokens that are the likeliest", sign=1, limits="coarse", by_default=%s)
def first_choice(batch):
    first = (batch.scores.gap > 0) & batch.scores.wanted
    return {
        "first_choice": first.sum(1).double() / batch.scores.wanted.sum(1),
        "first_choice_count": first.sum(1),
    }
"""


@pytest.fixture
def announced(monkeypatch, tmp_path):
    """Announce a measure of another package by an entry point, as its text."""

    def announce(text):
        (tmp_path / "their_package.py").write_text(text)
        points = [EntryPoint("first_choice", "their_package:first_choice", "vestige.measures")]
        for group in ("vestige.measures", "vestige.commands"):
            points += registry.entry_points(group=group)
        theirs = EntryPoints(points)
        monkeypatch.setattr(registry, "entry_points", lambda: theirs)
        registry.forget_entry_points()

    monkeypatch.syspath_prepend(tmp_path)
    list(MEASURES)  # a module registers when it is imported, which is once
    monkeypatch.setattr(MEASURES, "_added", dict(MEASURES._added))

    yield announce
    registry.forget_entry_points()
    sys.modules.pop("their_package", None)


@pytest.mark.slow
def test_a_measure_of_another_package_is_in_the_evidence_the_record_the_judgement_and_the_page(
    announced, place, tmp_path
):
    announced(THEIRS % True)
    found = simple(place, tmp_path / "run", holdout=str(place / "held.jsonl"))
    model = AutoModelForCausalLM.from_pretrained(place / "run/checkpoint-30").eval()
    tokenizer = AutoTokenizer.from_pretrained(place / "tiny-model")
    values, counts = found.values("first_choice"), found.table(["first_choice_count"]).column("first_choice_count")
    for row, question in enumerate(questions(QUESTIONS, "q", 0)[:6]):
        start = len(tokenizer(question["prompt"]).input_ids)
        ids = [*tokenizer(question["prompt"] + question["completion"]).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            likeliest = model(torch.tensor([ids])).logits[0].argmax(1).tolist()
        hits = [likeliest[position - 1] == ids[position] for position in range(start, len(ids))]
        assert values[row] == np.mean(hits)
        assert counts[row].as_py() == sum(hits)
    record = json.loads((found.folder / "run.json").read_text())
    assert record["measures"]["first_choice"]["meaning"] == "share of the target tokens that are the likeliest"
    assert record["measures"]["first_choice"]["high"] == "memorized"
    judged = {each.truth: each.sign for each in found.judgement() if each.measure == "first_choice"}
    assert judged == {"membership": 1, "flag": -1}
    assert not [each for each in found.judgement() if each.measure == "first_choice_count"], "a detail is not judged"
    page = report(found.folder, tmp_path / "page.html").read_text()
    assert "share of the target tokens that are the likeliest; high: memorized" in page


@pytest.mark.slow
def test_a_measure_that_is_not_there_by_default_is_computed_when_it_is_named(announced, place, tmp_path):
    announced(THEIRS % False)
    assert "first_choice" not in simple(place, tmp_path / "default", measures=("default",)).measures
    assert "first_choice" in simple(place, tmp_path / "named", measures=("first_choice",)).measures


def test_the_command_line_prints_every_measure_and_all_that_one_says_of_itself(announced, capsys):
    announced(THEIRS % False)
    names = [*measure_table().columns[0].cells]
    assert names[0] == "loss"
    assert set(names) == {*MEASURES.names()}
    assert "first_choice" in names
    main(["measures", "first_choice"])
    shown = capsys.readouterr().out
    assert all(words in shown for words in ("likeliest", "token scores", "coarse", "only when named"))
    main(["measures"])
    assert "first_choice" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main(["measures", "first_chioce"])
    assert "Did you mean 'first_choice'?" in capsys.readouterr().err


def test_a_column_of_another_name_is_refused_and_not_lost(announced, place, tmp_path):
    announced((THEIRS % True).replace('"first_choice_count"', '"count"'))
    with pytest.raises(SpecError, match="'first_choice' returned a column 'count', expected 'first_choice' or names"):
        simple(place, tmp_path / "run", measures=("first_choice",))


@pytest.mark.parametrize("name", MEASURES.names())
def test_every_measure_says_what_it_means_costs_and_when_not_to_believe_it(name):
    found = MEASURES.find(name)
    assert found.name == name
    assert found.meaning
    assert not found.meaning.endswith(".")
    assert all(f"  {key}" in describe_measure(name) for key in ("of", "high says", "needs", "costs", "limits"))


@pytest.mark.slow
def test_lists_begin_with_what_stands_out(place, tmp_path):
    found = simple(place, tmp_path / "run")
    low = {name for name in found.measures if found.lowest_first(name)}
    assert low == {"loss", "answer_loss", "zlib_ratio", "brier", "psmi"}


def test_two_measures_of_one_name_are_refused(monkeypatch):
    list(MEASURES)  # a module registers when it is imported, which is once
    monkeypatch.setattr(MEASURES, "_added", dict(MEASURES._added))
    with pytest.raises(SpecError, match="Two objects are called 'loss'"):
        measure("loss", "another loss")(lambda batch: batch.scores.log_probability.sum(1))
    assert isinstance(MEASURES.find("loss"), Measure)


def test_a_name_that_is_no_measure_ends_before_any_work(place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(place)
    words = ["audit", "--model", "no-such-model", "--data", "train.jsonl", "--out", str(tmp_path / "run")]
    for more, message in (
        (["--measures", "lost"], "There is no measure 'lost'. Did you mean 'loss'? There are: default, all, accuracy,"),
        (["--measures", "simplicity"], "simplicity compares with models that were not trained on the example"),
        (["--measures", "perplexity_ratio"], "perplexity_ratio compares with another model: give it as --reference"),
        (["--measures", "loss", "--choose-layer", "smi"], "--choose-layer smi is for psmi and mahalanobis"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(words + more)
        assert message in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())
