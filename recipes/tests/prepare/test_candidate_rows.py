import json

import numpy as np
import pyarrow.parquet as parquet
import pytest

import vestige_recipes.prepare
from vestige.cli import main
from vestige.data import load_examples, load_queries
from vestige.errors import DataError, IndexMismatch, SpecError
from vestige.evaluate import find_candidates, find_right_examples
from vestige.settings import ComponentsSettings

PROMPTS = ["Why is the sky blue?", "Why is grass green?", "Who wrote Emma?", "Is the moon a star?"]
TRAIN = [{"id": f"t{row}", "prompt": prompt, "completion": "x"} for row, prompt in enumerate(PROMPTS)]
QUERIES = [
    {"id": "q0", "prompt": "Tell me why the sky is blue", "completion": "x", "original_id": "t0"},
    {"id": "q1", "prompt": "the author of the book", "completion": "x", "original_id": "t2"},
    {"id": "q2", "prompt": "A star, or the Moon?", "completion": "x", "original_id": "t3"},
]


def listed(made, lines):
    return {row["id"]: row for row in lines(made.data)}


def test_queries_carry_their_candidates_and_the_rank_of_the_original(tmp_path, lines):
    made = vestige_recipes.prepare.candidates(data=TRAIN, queries=QUERIES, candidates=2, out=tmp_path / "out")
    rows = listed(made, lines)
    assert rows["q0"]["candidates"][0] == "t0"
    assert (rows["q0"]["original_rank"], rows["q0"]["forced"]) == (1, False)
    assert "t2" not in rows["q1"]["candidates"], "the truth gets no place that it has not earned"
    assert rows["q1"]["original_rank"] > 2
    table = parquet.read_table(tmp_path / "out" / "candidates.parquet").to_pylist()
    assert [(line["query_id"], line["rank"], line["original"]) for line in table[:3]] == [
        ("q0", 1, True),
        ("q0", 2, False),
        ("q1", 1, False),
    ]
    assert [line["example_id"] for line in table] == [name for row in rows.values() for name in row["candidates"]]
    record = json.loads((tmp_path / "out" / "prepare.json").read_text())
    assert (record["training"], sum(record["rank_of_original"].values())) == (4, 3)


def test_the_original_is_put_there_only_when_asked(tmp_path, lines):
    made = vestige_recipes.prepare.candidates(
        data=TRAIN, queries=QUERIES, candidates=2, include_original=True, out=tmp_path / "out"
    )
    row = listed(made, lines)["q1"]
    assert (row["candidates"][-1], row["forced"]) == ("t2", True)
    assert any("without having earned it" in note for note in made.notes)
    nameless = [{**QUERIES[0], "original_id": None}]
    with pytest.raises(DataError, match="1 of 1 queries name no original, such as 'q0'"):
        vestige_recipes.prepare.candidates(data=TRAIN, queries=nameless, include_original=True, out=tmp_path / "other")


def test_all_of_the_training_data_may_be_listed_by_the_command(tmp_path, lines, capsys):
    for name, rows in (("train", TRAIN), ("queries", QUERIES)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["data", "candidates", "--data", tmp_path / "train.jsonl", "--queries", tmp_path / "queries.jsonl"]
    words += ["--candidates", "all", "--limit", "2", "--out", tmp_path / "out"]
    main([*map(str, words)])
    rows = lines(tmp_path / "out" / "data.jsonl")
    assert [sorted(row["candidates"]) for row in rows] == [["t0", "t1", "t2", "t3"]] * 2
    assert "4 candidates of 4 for each of 2 queries" in capsys.readouterr().out


@pytest.mark.parametrize("forced", [False, True])
def test_evaluate_components_takes_them_as_it_takes_its_own(tmp_path, forced):
    made = vestige_recipes.prepare.candidates(
        data=TRAIN, queries=QUERIES, candidates=2, variant="lucene", include_original=forced, out=tmp_path / "out"
    )
    examples, queries = load_examples(TRAIN), load_queries(str(made.data))
    right = np.zeros((len(queries), len(examples)), dtype=bool)
    ids = [one.id for one in examples]
    for query, rows in enumerate(find_right_examples(queries, "original_id", [one.id for one in queries], ids)):
        right[query, rows] = True
    settings = ComponentsSettings(
        model="m", data="d", queries="q", out=tmp_path, candidates="2,given", include_original=forced
    )
    found = find_candidates(settings, queries, examples, right)
    for own, given in zip(found["2"], found["given"], strict=True):
        np.testing.assert_array_equal(given, own)


def test_the_same_call_changes_nothing_and_another_is_refused(tmp_path):
    made = vestige_recipes.prepare.candidates(data=TRAIN, queries=QUERIES, out=tmp_path / "out")
    before = made.data.read_bytes()
    vestige_recipes.prepare.candidates(data=TRAIN, queries=QUERIES, out=tmp_path / "out")
    assert made.data.read_bytes() == before
    with pytest.raises(IndexMismatch, match="`candidates`: 5 then, 'all' now"):
        vestige_recipes.prepare.candidates(data=TRAIN, queries=QUERIES, candidates="all", out=tmp_path / "out")
    with pytest.raises(IndexMismatch, match="other rows"):
        vestige_recipes.prepare.candidates(data=TRAIN[:3], queries=QUERIES[:2], out=tmp_path / "out")


def test_what_cannot_be_listed_is_said(tmp_path):
    with pytest.raises(DataError, match="'t3', which is not in the training data"):
        vestige_recipes.prepare.candidates(data=TRAIN[:3], queries=QUERIES, out=tmp_path / "out")
    for wrong in (0, "some"):
        with pytest.raises(SpecError, match="candidates"):
            vestige_recipes.prepare.candidates(data=TRAIN, queries=QUERIES, candidates=wrong, out=tmp_path / "out")
    blank = [{"id": "t0", "prompt": " ", "completion": " "}]
    with pytest.raises(DataError):
        vestige_recipes.prepare.candidates(data=blank, queries=QUERIES[:1], out=tmp_path / "out")


def test_of_several_originals_the_first_one_counts(tmp_path, lines):
    queries = [{**QUERIES[0], "original_id": None, "made_of": ["t3", "t0"]}]
    made = vestige_recipes.prepare.candidates(data=TRAIN, queries=queries, truth="made_of", out=tmp_path / "out")
    assert listed(made, lines)["q0"]["original_rank"] == 1
