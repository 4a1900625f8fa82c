"""A third of the table of benchmarks/architectures.py: exact, refused or listed as not covered, none silently wrong."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def sweep():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import architectures
    finally:
        sys.path.remove(str(BENCHMARKS))
    return architectures


@pytest.mark.slow
def test_no_gradient_of_a_third_of_all_architectures_is_wrong(sweep):
    rows = [sweep.check(kind) for kind in sweep.kinds("1/3")]
    built = [row for row in rows if row.verdict != "not built"]
    assert len(built) >= 30, rows
    assert [row for row in built if row.verdict == "WRONG"] == []
    assert sum(row.verdict == "exact" for row in built) >= 0.9 * len(built)


@pytest.mark.parametrize("kind", ["mamba2", "falcon_mamba", "phimoe", "llama4_text"])
def test_the_reported_architectures_are_exact_in_all_their_components(sweep, kind):
    row = sweep.check(kind)
    assert row.verdict == "exact", row


@pytest.mark.slow
def test_a_wrong_gradient_is_called_wrong(sweep, monkeypatch):
    right = sweep.gradients
    monkeypatch.setattr(sweep, "gradients", lambda *given: [1.001 * one for one in right(*given)])
    assert sweep.check("llama").verdict == "WRONG"
