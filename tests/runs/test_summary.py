import tracemalloc

import numpy as np
import pytest
import torch
from scipy import stats

from vestige.errors import VestigeError
from vestige.runs import ScoreBlock, ScoreCollector, sample_rows


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


@pytest.mark.slow
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("step", [40, 5_000])
def test_a_large_stream_is_summed_up_as_a_plain_matrix_is(dense, step):
    """With rows left out that are scored all the same, in any order, and a sample."""
    random, count, fitting = np.random.default_rng(0), 50_000, 30_000
    scores = (random.normal(size=(2, count)) ** 3).astype(np.float32)
    skipped = random.permutation(count)[:700].tolist()
    sources = [f"s{row % 5}" for row in range(count)]
    settings = {"dense": dense, "skipped": skipped, "sources": sources, "kept_bytes": 4 * 2 * fitting}
    summary = collect(scores, order=random.permutation(count), block=step, k=20, **settings)
    left = np.setdiff1d(np.arange(count), skipped)
    kept = left if dense else np.intersect1d(left, sample_rows(count, fitting))
    for query, found in enumerate(summary.distribution):
        values, sample = scores[query, left].astype(np.float64), scores[query, kept].astype(np.float64)
        assert (found.count, found.sampled) == (len(left), len(kept))
        assert (found.mean, found.std) == (pytest.approx(values.mean()), pytest.approx(values.std()))
        counts, edges = np.histogram(sample, bins=60, range=(values.min(), values.max()))
        assert (found.counts, found.edges) == (counts.tolist(), edges.tolist())
        held = np.cumsum(np.maximum(np.sort(values)[::-1], 0))
        lengths = (1, 3, 10, 30, 100, 300, 1000, 3000, 10000) if dense else (1, 3, 10)
        expected = [(k, pytest.approx(held[k - 1] / np.maximum(values, 0).sum())) for k in lengths]
        assert found.cumulative_share == expected
        best = left[np.argsort(-values, kind="stable")[:20]]
        assert [each.row for each in summary.ranked if (each.query, each.end) == (query, "proponent")] == best.tolist()
        groups = {each.source: each for each in summary.groups[query]}
        for number in range(5):
            own = scores[query, left[left % 5 == number]].astype(np.float64)
            assert groups[f"s{number}"].examples == len(own)
            assert groups[f"s{number}"].sum == pytest.approx(own.sum())
    if dense:
        assert summary.dense is not None
        expected = scores.copy()
        expected[:, skipped] = np.nan
        assert np.array_equal(summary.dense, expected, equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize("dense", [False, True])
def test_a_collector_holds_a_few_bytes_for_each_example(dense):
    def peak(count):
        tracemalloc.start()
        collector = ScoreCollector(2, count, dense=dense, sources=(f"s{row % 3}" for row in range(count)))
        for start in range(0, count, 5000):
            rows = torch.arange(start, start + 5000)
            collector.add(ScoreBlock(rows, torch.ones(2, 5000) * rows))
        collector.finish()
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    # The number of its source and the mark that it was scored; more while rows are hashed or sources are read.
    few, many = 150_000, 1_000_000
    assert (peak(many) - peak(few)) / (many - few) < 64


def test_the_sample_of_rows_is_fixed_and_spread_out():
    rows = sample_rows(10_000, 500)
    assert len(set(rows.tolist())) == 500
    assert (np.diff(rows) > 0).all()
    assert (sample_rows(10_000, 500) == rows).all()
    counts = np.histogram(rows, bins=10, range=(0, 10_000))[0]
    assert counts.min() > 25
    assert sample_rows(7, 9).tolist() == list(range(7))
    # Of earlier versions: a run of theirs is continued with the same sample.
    assert sample_rows(5000, 5).tolist() == [410, 821, 2875, 4527, 4967]
    assert set(sample_rows(5000, 77)) < set(sample_rows(5000, 4999))


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
    with pytest.raises(VestigeError, match="no training row 10 \\(290 rows are missing"):
        collector.finish()


def test_rows_that_are_left_out_are_not_missing():
    collector = ScoreCollector(1, 20, skipped=[3, 17])
    rows = torch.tensor([row for row in range(20) if row not in (3, 11, 17)])
    collector.add(ScoreBlock(rows, torch.zeros(1, 17)))
    with pytest.raises(VestigeError, match="no training row 11 \\(1 rows are missing"):
        collector.finish()
    collector.add(ScoreBlock(torch.tensor([3, 11]), torch.tensor([[float("nan"), 2.0]])))
    assert collector.finish().distribution[0].count == 18
