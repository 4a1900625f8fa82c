"""The tables of benchmarks/sketch_quality.py, with less training and fewer seeds, keep their bounds."""

import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def tables():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import sketch_quality
    finally:
        sys.path.remove(str(BENCHMARKS))
    torch.set_num_threads(1)
    return sketch_quality


@pytest.mark.slow
def test_digits_gauss_sjlt_and_masks_keep_their_bounds(tables):
    table, biases = tables.digits(range(2), epochs=5, sizes=(256,))
    assert [gate for gate in tables.digits_gates(table, biases) if not gate.passed] == []
    assert table["GraSS x4", 256].nrmse < table["mask", 256].nrmse


@pytest.mark.slow
def test_factgrass_keeps_up_with_logra_on_a_tiny_gpt(tables):
    table = tables.gpt(range(1), steps=10, sizes=(256,))
    assert [gate for gate in tables.gpt_gates(table) if not gate.passed] == []
    assert table["FactGraSS", 256].nrmse < table["factorised mask", 256].nrmse


def test_a_bound_that_is_not_kept_fails(tables):
    bad = {("Gauss", 64): tables.Cell(0.17, 0.5)}
    assert [gate.passed for gate in tables.digits_gates(bad, [3.1])] == [False, False]
