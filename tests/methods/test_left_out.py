"""Examples that an index leaves out (`--skip-bad`) are in no score, no distribution and no list."""

import json

import numpy as np
import pytest
import torch

import vestige
from tests.workshop import PAIRS, furnish, write_rows
from vestige.curvature import fisher_of
from vestige.gradients import GradientPass
from vestige.indexes import Index
from vestige.workspace import describe

BAD = (3, 7)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two indexes: of data with two examples without a finite loss, and of the others alone."""
    folder = furnish(tmp_path_factory.mktemp("left-out"))
    rows = [
        {"id": f"e{number}", "prompt": prompt, "completion": completion, "source": source}
        for number, (prompt, completion, source) in enumerate(PAIRS)
    ]
    write_rows(folder / "all.jsonl", rows)
    write_rows(folder / "good.jsonl", [row for number, row in enumerate(rows) if number not in BAD])
    write_rows(folder / "asked.jsonl", [{"prompt": "Who wrote Emma?", "completion": "Jane."}])
    original = GradientPass.run

    def poisoned(self, batch, sink):
        losses = original(self, batch, sink)
        losses[torch.isin(batch.rows, torch.tensor(BAD))] = float("nan")
        return losses

    with pytest.MonkeyPatch.context() as patch:
        build(folder, "good")
        patch.setattr(GradientPass, "run", poisoned)
        build(folder, "all", skip_bad=True)
    return folder


def build(place, name, **given):
    vestige.index(
        model=str(place / "tiny-model"), data=str(place / f"{name}.jsonl"), out=place / name, dtype="float32", **given
    )


def ask(place, name, method, **given):
    out = place / f"{name}-{method}"
    return vestige.attribute(
        index=place / name, queries=str(place / "asked.jsonl"), out=out, method=method, trust=False, **given
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", ["influence", "grad-cos", "ekfac", "cg", "lissa", "arnoldi", "rep-sim"])
def test_they_are_not_scored_and_the_others_score_as_without_them(place, method):
    with_bad, without = ask(place, "all", method), ask(place, "good", method)
    assert with_bad.run.left_out == ["e3", "e7"]
    assert without.run.left_out == []
    pairs = zip(with_bad.top(0, 100), without.top(0, 100), strict=True)
    for one, other in pairs:
        assert one.example_id == other.example_id
        assert one.score == pytest.approx(other.score, rel=1e-4, abs=1e-6)
        assert one.percentile == pytest.approx(other.percentile)
    one, other = (next(iter(run.run.distribution.values())) for run in (with_bad, without))
    assert one.count == other.count == len(PAIRS) - 2
    assert one.counts == other.counts
    assert (one.mean, one.std) == pytest.approx((other.mean, other.std), rel=1e-4, abs=1e-6)
    one, other = (next(iter(run.run.groups.values())) for run in (with_bad, without))
    assert {group.source: group.examples for group in one} == {group.source: group.examples for group in other}


def test_curvature_divides_by_the_examples_that_count(place):
    pairs = zip(fisher_of(Index.open(place / "all")).blocks, fisher_of(Index.open(place / "good")).blocks, strict=True)
    assert all(torch.allclose(one.matrix, other.matrix, rtol=1e-4, atol=1e-6) for one, other in pairs)


def test_self_influence_has_no_line_for_them_and_dense_scores_are_nan(place):
    run = ask(place, "all", "grad-dot", self_influence=True, dense=True)
    assert {row.example_id for row in run.self_influence()}.isdisjoint({"e3", "e7"})
    assert len(run.self_influence()) == len(PAIRS) - 2
    assert np.flatnonzero(np.isnan(run.dense()[0])).tolist() == list(BAD)


def test_status_lists_them(place):
    run = ask(place, "all", "bm25")
    assert {row.example_id for row in run.top(0, 100)}.isdisjoint({"e3", "e7"})
    assert "left out    2, not finite: e3, e7" in describe(place / "all")
    assert "left out    2, not finite: e3, e7" in describe(run.folder)
    assert json.loads((run.folder / "run.json").read_text())["left_out"] == ["e3", "e7"]
