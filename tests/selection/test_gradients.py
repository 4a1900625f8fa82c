"""Diversity and near copies beside plain loops over vectors."""

import json

import numpy as np
import pytest
import torch

from tests.reference import selection as reference
from vestige.errors import SpecError
from vestige.indexes import Index
from vestige.selection import facility_location, select, uniforms

IDS = [f"pair-{number}" for number in range(12)]


def vectors_of(store):
    return Index.open(store).gradients_of(range(12)).double().tolist()


@pytest.mark.parametrize("seed", range(4))
def test_lazy_facility_location_is_the_plain_greedy_search(seed):
    random = np.random.default_rng(seed)
    vectors = random.normal(size=(14, 5))
    vectors[3], vectors[9] = vectors[1], 0.0
    ties = random.random(14)
    found = list(facility_location(torch.from_numpy(vectors), torch.from_numpy(ties)))
    rows, gains = reference.plain_greedy(vectors.tolist(), ties.tolist(), 14)
    assert [row for row, _ in found] == rows
    assert [gain for _, gain in found] == pytest.approx(gains, abs=1e-9)


def test_gains_add_up_to_what_is_represented():
    vectors = np.random.default_rng(5).normal(size=(20, 4))
    found = list(facility_location(torch.from_numpy(vectors), torch.rand(20)))[:6]
    assert sum(gain for _, gain in found) == pytest.approx(
        reference.represented(vectors.tolist(), [row for row, _ in found])
    )


def test_diverse_is_the_greedy_search_over_the_index(store, given, tmp_path):
    chosen = select(index=store, data=given["data"], budget=6, out=tmp_path / "out", strategy="diverse")
    rows, gains = reference.plain_greedy(vectors_of(store), uniforms(IDS, 0, "ties").tolist(), 6)
    assert [choice.row for choice in chosen.choices] == rows
    assert chosen.choices[0].reason.startswith(f"adds {gains[0]:.3g} to the mean similarity")


def test_diverse_never_takes_both_of_two_copies_early(store, tmp_path):
    """Rows 0 and 8, and 2 and 9, hold the same text."""
    chosen = {choice.row for choice in select(index=store, budget=10, out=tmp_path / "o", strategy="diverse").choices}
    assert len(chosen & {0, 8}) == len(chosen & {2, 9}) == 1


def test_a_pool_is_the_best_by_score(store, run, tmp_path):
    pool = {choice.row for choice in select(scores=run, budget=6, out=tmp_path / "top").choices}
    chosen = select(scores=run, index=store, budget=3, pool=2, out=tmp_path / "out", strategy="diverse")
    assert {choice.row for choice in chosen.choices} < pool
    assert all(choice.score is not None for choice in chosen.choices)


@pytest.mark.parametrize("threshold", [0.2, 0.6, 1.0])
def test_near_copies_are_left_out_and_named(store, given, tmp_path, threshold):
    order = select(data=given["data"], index=store, budget="100%", out=tmp_path / "all", strategy="random")
    chosen = select(
        data=given["data"], index=store, budget="100%", out=tmp_path / "out", strategy="random", duplicates=threshold
    )
    kept, replaced = reference.without_twins([choice.row for choice in order.choices], vectors_of(store), threshold)
    assert [choice.row for choice in chosen.choices] == kept
    assert {c.row: c.replaces for c in chosen.choices if c.replaces} == {
        row: [IDS[other] for other in others] for row, others in replaced.items()
    }
    assert all(threshold - 1e-6 <= cosine <= 1 for choice in chosen.choices for cosine in choice.cosines)
    lines = [json.loads(line) for line in chosen.removed.read_text().splitlines()] if chosen.removed else []
    assert [(line["id"], line["problem"]) for line in lines] == [
        (name, "near copy") for name in IDS if any(name in choice.replaces for choice in chosen.choices)
    ]
    copies = {choice.example_id: choice.replaces for choice in chosen.choices}
    assert all(line["id"] in copies[line["copy_of"]] for line in lines)


def test_exact_copies_are_near_copies_at_any_threshold(store, tmp_path):
    chosen = select(index=store, budget="100%", out=tmp_path / "out", strategy="random", duplicates=1.0)
    rows = {choice.row for choice in chosen.choices}
    assert len(chosen) == 10
    assert len(rows & {0, 8}) == len(rows & {2, 9}) == 1
    assert "2 near copies of chosen ones were left out" in str(chosen)


def test_gradients_of_zero_are_like_none(store, monkeypatch, tmp_path):
    monkeypatch.setattr(Index, "gradients_of", lambda self, rows: torch.zeros(len(rows), self.width))
    chosen = select(index=store, budget="100%", out=tmp_path / "out", strategy="random", duplicates=0.5)
    assert len(chosen) == 12


def test_too_many_gradients_are_refused_with_a_way_out(store, tmp_path, monkeypatch):
    monkeypatch.setattr(Index, "width", 2**40)
    with pytest.raises(Exception, match="pool=4"):
        select(index=store, budget=3, out=tmp_path / "out", strategy="diverse")


def test_gradients_need_an_index(run, tmp_path):
    for choice in ({"strategy": "diverse"}, {"duplicates": 0.9}):
        with pytest.raises(SpecError, match="Give index="):
            select(scores=run, budget=3, out=tmp_path / "out", **choice)
