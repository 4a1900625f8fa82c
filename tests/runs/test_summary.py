import numpy as np
import pytest
import torch
from scipy import stats

from vestige.errors import VestigeError
from vestige.runs import ScoreBlock, ScoreCollector, sampled_rows


def collect(scores: np.ndarray, *, order=None, block=17, **options):
    order = np.arange(scores.shape[1]) if order is None else order
    collector = ScoreCollector(*scores.shape, **options)
    for start in range(0, len(order), block):
        rows = order[start : start + block]
        collector.add(ScoreBlock(torch.tensor(rows), torch.tensor(scores[:, rows])))
    return collector.finish()


@pytest.fixture
def scores() -> np.ndarray:
    return (np.random.default_rng(0).normal(size=(2, 300)) ** 3 + 1000).astype(np.float32)


def test_moments_and_histogram_equal_numpys(scores):
    summary = collect(scores, order=np.random.default_rng(1).permutation(300), k=5)
    for query, found in enumerate(summary.distribution):
        values = scores[query].astype(np.float64)
        assert found.count == found.sampled == 300
        assert found.mean == pytest.approx(values.mean(), rel=1e-12)
        assert found.std == pytest.approx(values.std(), rel=1e-9)
        assert (found.min, found.max) == (values.min(), values.max())
        counts, edges = np.histogram(values, bins=60)
        assert found.counts == counts.tolist()
        assert found.edges == pytest.approx(edges.tolist())


def test_cumulative_share_is_that_of_the_positive_scores():
    summary = collect(np.array([[8.0, 1.0, -5.0, 1.0, 0.0]], dtype=np.float32), k=2)
    assert summary.distribution[0].cumulative_share == [(1, pytest.approx(0.8)), (3, pytest.approx(1.0))]
    assert collect(np.array([[-1.0, 0.0]], dtype=np.float32)).distribution[0].cumulative_share == []


def test_too_many_scores_to_keep_leave_everything_exact_but_the_histogram(scores):
    whole = collect(scores, k=40)
    sampled = collect(scores, k=40, kept_bytes=4 * 2 * 100, order=np.arange(300)[::-1].copy(), block=33)
    assert sampled.ranked == whole.ranked
    for part, full in zip(sampled.distribution, whole.distribution, strict=True):
        assert part.sampled == sum(part.counts) == 100
        assert part.mean == pytest.approx(full.mean)
        assert (part.min, part.max, part.edges) == (full.min, full.max, full.edges)
        known = dict(full.cumulative_share)
        # Shares are given as far as the exact end reaches, and not guessed beyond.
        assert [k for k, _ in part.cumulative_share] == [1, 3, 10, 30]
        assert all(share == pytest.approx(known[k], rel=1e-5) for k, share in part.cumulative_share)


def test_the_sample_of_rows_is_fixed_and_spread_out():
    rows = sampled_rows(10_000, 500)
    assert len(set(rows.tolist())) == 500
    assert (np.diff(rows) > 0).all()
    assert (sampled_rows(10_000, 500) == rows).all()
    counts = np.histogram(rows, bins=10, range=(0, 10_000))[0]
    assert counts.min() > 25
    assert sampled_rows(7, 9).tolist() == list(range(7))


def test_groups_equal_a_plain_loop(scores):
    sources = [None if row % 7 == 0 else f"s{row % 3}" for row in range(300)]
    sources[5] = "alone"
    groups = collect(scores, sources=sources, order=np.random.default_rng(2).permutation(300)).groups[1]
    assert [group.source for group in groups] == [
        group.source for group in sorted(groups, key=lambda group: -group.sum)
    ]
    for group in groups:
        values = np.array(
            [scores[1, row] for row in range(300) if (sources[row] or "(no source)") == group.source],
            dtype=np.float64,
        )
        assert group.examples == len(values)
        assert group.sum == pytest.approx(values.sum())
        assert group.mean == pytest.approx(values.mean())
        if len(values) > 1:
            low, high = stats.t.interval(0.95, len(values) - 1, values.mean(), stats.sem(values))
            assert (group.low, group.high) == (pytest.approx(low, rel=1e-6), pytest.approx(high, rel=1e-6))
        else:
            assert group.low is None


def test_no_groups_without_sources(scores):
    assert collect(scores, sources=[None] * 300).groups == [[], []]


def test_dense_scores_are_kept_in_row_order(scores):
    dense = collect(scores, dense=True, order=np.random.default_rng(3).permutation(300), kept_bytes=8).dense
    assert dense is not None
    assert np.array_equal(dense, scores)
    assert collect(scores).dense is None


def test_constant_scores_have_a_histogram():
    found = collect(np.full((1, 9), 0.1, dtype=np.float32)).distribution[0]
    assert sum(found.counts) == 9
    assert found.std == pytest.approx(0, abs=1e-9)


def test_a_row_scored_twice_or_never_is_an_error(scores):
    collector = ScoreCollector(2, 300)
    block = ScoreBlock(torch.arange(10), torch.tensor(scores[:, :10]))
    collector.add(block)
    with pytest.raises(VestigeError, match="row 0 twice"):
        collector.add(block)
    with pytest.raises(VestigeError, match="no training row 10"):
        collector.finish()
