import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from vestige.errors import NonFinite
from vestige.runs import ScoreBlock, ScoreCollector, TopK


def reference(scores: np.ndarray, k: int, end: str) -> list[tuple[int, float, float]]:
    """Sorts everything; percentile by counting."""
    sign = -1 if end == "proponent" else 1
    order = sorted(range(len(scores)), key=lambda row: (sign * scores[row], row))[:k]
    smaller = [sum(other < scores[row] for other in scores) for row in order]
    return [(row, scores[row], 100 * count / len(scores)) for row, count in zip(order, smaller, strict=True)]


def streamed(scores: np.ndarray, k: int, order: np.ndarray, block: int) -> TopK:
    top = TopK(len(scores), k)
    for start in range(0, len(order), block):
        rows = order[start : start + block]
        top.add(rows, scores[:, rows])
    return top


@settings(max_examples=150, deadline=None)
@given(
    values=st.lists(st.sampled_from([-2.0, -1.0, -0.5, 0.0, -0.0, 0.25, 1.0, 3.0]), min_size=1, max_size=40),
    k=st.integers(1, 12),
    block=st.integers(1, 15),
    seed=st.integers(0, 5),
)
def test_both_ends_equal_a_full_sort_with_many_ties(values, k, block, seed):
    scores = np.array([values, np.roll(values, 3)])
    top = streamed(scores, k, np.random.default_rng(seed).permutation(len(values)), block)
    for query in range(2):
        for end in ("proponent", "opponent"):
            found = [
                (entry.row, entry.score, entry.percentile)
                for entry in top.rank()
                if (entry.query, entry.end) == (query, end)
            ]
            assert found == reference(scores[query], k, end)


def test_block_order_and_size_change_nothing():
    scores = np.random.default_rng(0).integers(0, 20, size=(3, 500)).astype(np.float32)
    plain = streamed(scores, 10, np.arange(500), 500).rank()
    for seed, block in ((1, 1), (2, 7), (3, 499)):
        order = np.random.default_rng(seed).permutation(500)
        assert streamed(scores, 10, order, block).rank() == plain
    assert [entry.rank for entry in plain[:10]] == list(range(1, 11))


def test_a_score_that_is_not_finite_is_refused_by_name():
    block = ScoreBlock(torch.tensor([4, 9]), torch.tensor([[1.0, 2.0], [3.0, float("nan")]]))
    with pytest.raises(NonFinite, match="training row 9 for query 1"):
        ScoreCollector(2, 10).add(block)


def test_half_precision_blocks_are_read():
    collector = ScoreCollector(1, 1, dense=True)
    collector.add(ScoreBlock(torch.tensor([0], dtype=torch.int32), torch.tensor([[0.5]], dtype=torch.bfloat16)))
    assert collector.finish().dense.tolist() == [[0.5]]
