"""An index on a card that is too small for its batches: the batches become smaller, the rows stay."""

import numpy as np
import pytest
import torch

import vestige
from tests.workshop import furnish
from vestige.errors import UserError
from vestige.gradients import GradientPass


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return furnish(tmp_path_factory.mktemp("memory"))


def hold_at_most(examples: int, monkeypatch) -> list[int]:
    """Let every gradient pass run out of memory above this many examples; return the sizes that were tried."""
    run, tried = GradientPass.run, []

    def bounded(self, batch, sink):
        tried.append(len(batch.rows))
        if len(batch.rows) > examples:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return run(self, batch, sink)

    monkeypatch.setattr(GradientPass, "run", bounded)
    return tried


def build(place, out, **more):
    # All examples in one batch.
    settings = {"model": str(place / "tiny-model"), "data": place / "train.jsonl", "token_budget": 4096}
    return vestige.index(**settings, out=place / out, dtype="float32", **more)


def test_an_index_that_runs_out_of_memory_has_the_same_rows(place, monkeypatch, capsys):
    whole = build(place, "whole")
    tried = hold_at_most(4, monkeypatch)
    halved = build(place, "halved")
    assert max(tried) == 12
    assert capsys.readouterr().err.count("Out of memory") >= 1
    rows = np.arange(whole.rows)
    torch.testing.assert_close(halved.gradients_of(rows), whole.gradients_of(rows), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(halved.losses_and_norms()[0], whole.losses_and_norms()[0], rtol=1e-5, atol=1e-5)
    print("the same bytes:", halved.fingerprint == whole.fingerprint)
    # The plan is that of the budget, whatever the memory was.
    assert halved.manifest == whole.manifest
    assert halved.verify() == []


def test_an_example_that_alone_is_too_large_ends_the_index_with_what_to_type(place, monkeypatch):
    hold_at_most(0, monkeypatch)
    with pytest.raises(UserError, match="too small for one example"):
        build(place, "none")


@pytest.mark.parametrize("method", ["grad-dot", "grad-cos"])
def test_exact_scores_that_run_out_of_memory_are_the_same(place, monkeypatch, method):
    settings = {"model": str(place / "tiny-model"), "data": place / "train.jsonl", "token_budget": 4096}
    asked = {"queries": ["Who wrote Emma?"], "method": method, "trust": False, "dense": True, "max_new_tokens": 4}
    found = []
    for number, most in enumerate((12, 4)):
        hold_at_most(most, monkeypatch)
        run = vestige.attribute(**settings, **asked, out=place / f"{method}-{number}")
        found.append(run.dense_of(0))
        monkeypatch.undo()
    np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-5 * np.abs(found[0]).max())


def test_a_pass_that_cannot_be_cut_says_what_to_type(place, monkeypatch):
    """The sums of a curvature cannot be taken back in the middle of a batch."""
    hold_at_most(0, monkeypatch)
    settings = {"model": str(place / "tiny-model"), "data": place / "train.jsonl", "queries": ["Who wrote Emma?"]}
    with pytest.raises(UserError, match=r"GPU.*(token_budget|max_length)"):
        vestige.attribute(**settings, method="ekfac", trust=False, out=place / "ekfac", max_new_tokens=4)
