"""Every strategy beside plain loops over all scores: planted scores with ties, negative ones and gaps."""

import json

import numpy as np
import pytest

from tests.reference import selection as reference
from tests.selection.conftest import QUERIES
from vestige.errors import DataError
from vestige.selection import open_scores, order_by_gumbel, order_round_robin, select, uniforms

IDS = [f"pair-{number}" for number in range(12)]
TIES = uniforms(IDS, 0, "ties")


def tied_scores():
    """Small whole numbers, so that most examples tie with others."""
    return np.random.default_rng(1).integers(-3, 4, size=(3, 12)).astype(np.float32)


def rows_of(chosen):
    return [choice.row for choice in chosen.choices]


@pytest.mark.parametrize("budget", [1, 5, 12])
def test_top_is_the_highest_mean_with_ties_by_hash(planted, tmp_path, budget):
    scores = tied_scores()
    chosen = select(scores=planted(scores), budget=budget, out=tmp_path / "out")
    means = reference.mean_over_queries(scores)
    assert rows_of(chosen) == reference.highest(means, TIES, budget)
    assert [choice.score for choice in chosen.choices] == pytest.approx([means[row] for row in rows_of(chosen)])
    assert chosen.choices[0].reason == "place 1 by mean score over 3 queries"


@pytest.mark.parametrize("targets", [None, "source"])
def test_per_target_is_the_highest_for_any_one_target(planted, tmp_path, targets):
    scores = tied_scores()
    groups = {"sky": [0], "france": [1], "ant": [2]} if targets is None else {"nature": [0, 2], "places": [1]}
    chosen = select(scores=planted(scores), budget=7, out=tmp_path / "out", strategy="per-target", targets=targets)
    best = reference.best_target(scores, groups)
    assert rows_of(chosen) == reference.highest([each[0] for each in best], TIES, 7)
    assert [choice.target for choice in chosen.choices] == [best[row][1] for row in rows_of(chosen)]


def test_round_robin_gives_each_query_its_best_in_turn(planted, tmp_path):
    scores = tied_scores()
    chosen = select(scores=planted(scores), budget=12, out=tmp_path / "out", strategy="round-robin")
    expected = reference.round_robin(scores, TIES, 12)
    assert [(choice.row, choice.target) for choice in chosen.choices] == [
        (row, QUERIES[query]["id"]) for row, query in expected
    ]
    assert chosen.choices[0].reason == "place 1 of query sky"


def test_round_robin_reads_on_where_a_head_is_used_up(planted):
    # All queries want the same examples: the heads of the others are soon taken.
    scores = np.tile(np.arange(12, dtype=np.float32)[::-1], (3, 1))
    order = order_round_robin(open_scores(planted(scores)), TIES, None, look=1)
    assert [candidate.row for candidate in order] == list(range(12))


def test_scores_are_read_in_blocks_with_the_same_outcome(planted):
    folder, groups = planted(tied_scores()), [[0, 2], [1]]
    expected, found = open_scores(folder).best(groups), open_scores(folder, block_bytes=1).best(groups)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("strategy", ["top", "per-target", "round-robin", "gumbel"])
def test_what_has_a_score_that_is_no_number_is_never_chosen(planted, tmp_path, strategy):
    scores = tied_scores()
    scores[:, 4] = np.nan
    scores[1, 7] = np.inf
    chosen = select(scores=planted(scores), budget="100%", out=tmp_path / "out", strategy=strategy)
    # A query by itself may still want an example that another query has no number for.
    gone = {4} if strategy == "round-robin" else {4, 7}
    assert set(rows_of(chosen)) == set(range(12)) - gone
    assert any("no more are allowed" in note for note in chosen.notes)


@pytest.mark.parametrize("strategy", ["top", "per-target", "round-robin", "gumbel", "random"])
def test_harmful_examples_are_left_out(planted, tmp_path, strategy):
    scores = tied_scores()
    chosen = select(scores=planted(scores), budget="100%", out=tmp_path / "out", strategy=strategy, min_score=0)
    assert chosen.choices
    if strategy in ("top", "gumbel", "random"):
        wanted = {row for row, mean in enumerate(reference.mean_over_queries(scores)) if mean >= 0}
    else:
        wanted = {row for row in range(12) if scores[:, row].max() >= 0}
    assert set(rows_of(chosen)) == wanted
    assert all(choice.score >= 0 for choice in chosen.choices)


def test_nothing_to_choose_is_said(planted, tmp_path):
    with pytest.raises(DataError, match="Give a lower `min_score`"):
        select(scores=planted(tied_scores()), budget=3, out=tmp_path / "out", min_score=100)
    with pytest.raises(DataError, match="Nothing can be chosen"):
        select(scores=planted(np.full((3, 12), np.nan), "gap"), budget=3, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_gumbel_favours_high_scores_by_the_odds_that_it_states(planted, tmp_path):
    """First picks over many seeds against the softmax of standardised means: 4 standard errors."""
    source = open_scores(planted(tied_scores()))
    means = np.array(reference.mean_over_queries(tied_scores()))
    odds = np.exp((means - means.mean()) / means.std() / 0.7)
    odds /= odds.sum()
    draws = 2_000
    counts = np.zeros(12)
    for seed in range(draws):
        counts[next(order_by_gumbel(source, uniforms(IDS, seed, "gumbel"), TIES, 0.7, None)).row] += 1
    errors = np.sqrt(odds * (1 - odds) / draws)
    assert (np.abs(counts / draws - odds) <= 4 * errors).all()


def test_a_cold_gumbel_draw_is_the_top_and_equal_scores_are_drawn_at_random(planted, tmp_path):
    scores = np.arange(36, dtype=np.float32).reshape(3, 12)
    cold = select(scores=planted(scores), budget=6, out=tmp_path / "a", strategy="gumbel", temperature=1e-6)
    assert rows_of(cold) == [11, 10, 9, 8, 7, 6]
    flat = planted(np.ones((3, 12)), "flat")
    orders = {
        tuple(rows_of(select(scores=flat, budget=12, out=tmp_path / f"f{seed}", strategy="gumbel", seed=seed)))
        for seed in range(3)
    }
    assert len(orders) == 3


def test_random_depends_on_ids_and_seed_and_not_on_the_order_of_the_data(workshop, given, tmp_path):
    lines = (workshop / "train.jsonl").read_text().splitlines(keepends=True)
    turned = tmp_path / "turned.jsonl"
    turned.write_text("".join(lines[::-1]))
    one = select(data=given["data"], budget=5, out=tmp_path / "a", strategy="random")
    two = select(data=str(turned), budget=5, out=tmp_path / "b", strategy="random")
    other = select(data=given["data"], budget=5, out=tmp_path / "c", strategy="random", seed=1)
    assert one.ids == two.ids != other.ids


def test_every_example_is_drawn_about_equally_often():
    counts = np.zeros(12)
    for seed in range(1_200):
        counts[np.argsort(uniforms(IDS, seed, "random"))[:3]] += 1
    # Binomial(1200, 1/4): standard deviation 15.
    assert np.abs(counts - 300).max() < 4 * 15


def test_trap_ties_are_not_broken_by_row(planted, tmp_path):
    chosen = select(scores=planted(np.zeros((3, 12))), budget=12, out=tmp_path / "out")
    assert rows_of(chosen) != sorted(rows_of(chosen))
    again = select(scores=planted(np.zeros((3, 12)), "more"), budget=12, out=tmp_path / "out2", seed=1)
    assert rows_of(again) != rows_of(chosen)


@pytest.mark.parametrize("strategy", ["top", "per-target", "round-robin", "gumbel", "random"])
def test_what_was_kept_out_for_harm_is_listed_with_its_score(planted, tmp_path, strategy):
    scores = tied_scores()
    scores[:, 4], scores[:, 2], scores[:, 5] = np.nan, -3, -1
    chosen = select(scores=planted(scores), budget=2, out=tmp_path / "out", strategy=strategy, min_score=0)
    by_mean = strategy in ("top", "gumbel", "random")
    means = np.array(reference.mean_over_queries(scores), dtype=float) if by_mean else scores.max(0)
    harmful = {IDS[row]: means[row] for row in range(12) if means[row] < 0}
    assert harmful, "the planted scores have some"
    lines = [json.loads(line) for line in chosen.removed.read_text().splitlines()]
    assert {line["id"]: line["score"] for line in lines} == pytest.approx(harmful)
    assert {line["problem"] for line in lines} == {"score below 0"}
    assert all(line["prompt"] for line in lines), "whole rows"
    assert f"{len(harmful)} examples have a score below 0 and were kept out." in chosen.notes


def test_where_nothing_is_kept_out_there_is_no_list(planted, tmp_path):
    chosen = select(scores=planted(np.ones((3, 12))), budget=2, out=tmp_path / "out", min_score=0)
    assert chosen.removed is None
    assert not (tmp_path / "out" / "removed.jsonl").exists()
