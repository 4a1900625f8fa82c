"""Four plants on the leaderboard: what is planted, the four measures on scores made by hand, and the study in small."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from vestige.data import words_of
from vestige.methods import METHODS, lexical_scores
from vestige_recipes import study
from vestige_recipes.common.texts import Texts
from vestige_recipes.leaderboard.planted import PLANS, judge_plants, make_plants

TRAIN = [{"id": name} for name in "abcdef"]


def judge(kind, right, *scores):
    """Return what the measure of one kind says of queries with these scores."""
    made = Texts([], TRAIN, [{"source": kind, "right": list(right)} for _ in scores])
    return judge_plants(np.array(scores, dtype=np.float32), made, seed=0)[kind]


def test_recall_is_the_reciprocal_rank_of_the_first_row_that_states_the_fact():
    first, third = [9, 8, 7, 6, 5, 4], [2, 9, 8, 1, 1, 7]
    assert judge("recall", "ad", first).value == 1
    found = judge("recall", "ab", first, third, [1, 2, 9, 8, 7, 6])
    assert found.value == pytest.approx((1 + 1 + 1 / 5) / 3)
    assert found.low <= found.value <= found.high
    # All tied, one right row among six: the mean of 1 / rank over every order.
    assert judge("recall", "c", [0] * 6).value == pytest.approx(np.mean(1 / np.arange(1, 7)))


def test_a_class_counts_the_first_row_alone_and_a_tie_at_the_top_by_its_share():
    assert judge("class", "ab", [9, 1, 2, 3, 4, 5], [1, 8, 9, 0, 0, 0]).value == 0.5
    assert judge("class", "ab", [9, 9, 9, 3, 4, 5]).value == pytest.approx(2 / 3)
    assert judge("class", "ab", [0, 0, 9, 9, 0, 0]).value == 0


@pytest.mark.parametrize("kind", ["shortcut", "mixed data"])
def test_hidden_rows_are_judged_by_average_precision(kind):
    scores = np.random.default_rng(0).integers(0, 4, (5, 6))
    marked = [name in "bef" for name in "abcdef"]
    wanted = np.mean([average_precision_score(marked, each) for each in scores])
    assert judge(kind, "bef", *scores).value == pytest.approx(wanted)
    assert judge(kind, "bef", [0, 9, 0, 0, 8, 7]).value == 1


def test_each_kind_is_judged_by_its_own_queries():
    kinds = ["recall", "class", "shortcut", "mixed data"]
    made = Texts([], TRAIN, [{"source": kind, "right": ["a"]} for kind in kinds])
    found = judge_plants(
        np.array([[9, 0, 0, 0, 0, 0], [0, 9, 0, 0, 0, 0], [9, 0, 0, 0, 0, 0], [8, 9, 0, 0, 0, 0]]), made, 0
    )
    assert {kind: found[kind].value for kind in kinds} == {"recall": 1, "class": 0, "shortcut": 1, "mixed data": 0.5}


def test_words_alone_find_the_echoes_and_neither_the_trigger_nor_the_foreign_rows():
    made = make_plants(PLANS["pocket"], 3)
    words = [[words_of(row["text"]) for row in rows] for rows in (made.queries, made.train)]
    found = judge_plants(lexical_scores(*words), made, 0)
    assert found["recall"].value <= 1 / 3
    assert found["class"].value == 1
    assert found["shortcut"].value < 0.5


def test_a_loss_is_on_the_answer_alone_and_no_query_was_trained_on():
    made = make_plants(PLANS["pocket"], 0)
    for row in (*made.before, *made.train, *made.queries):
        learned = [label for label in row["labels"] if label >= 0]
        assert bytes(learned).decode() == row["answer"]
        assert bytes(row["input_ids"]).decode() == row["text"]
    ids, texts = ([row[column] for row in made.train] for column in ("id", "text"))
    assert len(set(ids)) == len(ids)
    assert len(set(texts)) == len(texts)
    assert not {row["text"] for row in made.queries} & {*texts, *(row["text"] for row in made.before)}
    for query in made.queries:
        right = [row for row in made.train if row["id"] in query["right"]]
        assert {row["answer"] for row in right} == {query["answer"]}
    triggered = {row["text"].split()[0][-2:] for row in made.queries if row["source"] == "shortcut"}
    assert triggered == {row["text"].split()[0][-2:] for row in made.train if row["source"] == "shortcut"} == {"xq"}
    assert not any("xq" in row["text"] for row in made.before)


@pytest.mark.slow
def test_every_method_is_judged_on_four_plants_and_a_second_call_keeps_all(tmp_path):
    report = study("leaderboard-planted", size="tiny", seeds=1, out=tmp_path / "board")
    names = [row[0] for row in report.rows]
    assert names[:2] == ["chance", "rise of the loss without these rows, nats"]
    assert report.columns == ("method", "recall", "95 %", "class", "95 %", "shortcut", "95 %", "mixed data", "95 %")
    for method in METHODS:
        listed = (*names, *report.details["not_on_the_board"])
        assert any(name.replace(",", " ").split()[0] == method.name for name in listed)
    recalls = [row[1] for row in report.rows[2:]]
    assert recalls == sorted(recalls, reverse=True)
    assert set(report.details["rises"]) == {"recall", "class", "shortcut", "mixed data", "echoes"}
    scored = {path: path.stat().st_mtime_ns for path in (tmp_path / "board" / "runs").glob("*/run.json")}
    again = study("leaderboard-planted", size="tiny", seeds=1, out=tmp_path / "board")
    assert again.rows == report.rows
    assert {path: path.stat().st_mtime_ns for path in scored} == scored
