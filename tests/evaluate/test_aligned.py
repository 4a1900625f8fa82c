"""Scores read in blocks, in other orders and by others' ids, against whole matrices; and the memory that they take."""

import math
import tracemalloc
from fractions import Fraction
from itertools import groupby
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from vestige.evaluate._aligned import aligned, summed

from vestige.data import Example
from vestige.errors import DataError, IndexMismatch, UserError
from vestige.evaluate import _aligned, _ranking_measures, datamodeling_score, effects
from vestige.evaluate._mislabel import _judgement, wrong_labels
from vestige.evaluate._retrieval import _per_query, right_examples, ties_of
from vestige.evaluate._scored import Scored, together
from vestige.runs import Scores, _dense
from vestige.settings import MislabelSettings

QUERIES, EXAMPLES = 4, 300


@pytest.fixture
def blocks(monkeypatch):
    monkeypatch.setattr(_aligned, "BLOCK_EXAMPLES", 64)
    monkeypatch.setattr(_ranking_measures, "BLOCK", 50)
    monkeypatch.setattr(_dense, "_IDS_AT_ONCE", 37)


def run_in(folder, scores, queries, examples):
    folder.mkdir(exist_ok=True)
    _dense.write_dense(folder / _dense.DENSE_FILE, scores, queries, examples)
    return Scored(folder.name, Scores(folder, SimpleNamespace(method=folder.name)))


@pytest.fixture
def world(tmp_path):
    """A run, the same scores with their examples and queries in another order, and the scores."""
    random = np.random.default_rng(0)
    scores = random.integers(40, size=(QUERIES, EXAMPLES)).astype(np.float32)
    names, asked = [f"example {row}" for row in range(EXAMPLES)], [f"q{row}" for row in range(QUERIES)]
    rows, columns = random.permutation(QUERIES), random.permutation(EXAMPLES)
    shuffled = [asked[row] for row in rows], [names[row] for row in columns]
    runs = [
        run_in(tmp_path / "one", scores, asked, names),
        run_in(tmp_path / "other", scores[np.ix_(rows, columns)], *shuffled),
    ]
    return runs, scores, asked, names


def slow_measures(scores, right, lengths):
    """Sorted, and group after group of equal scores, with binomial coefficients and fractions."""
    ranking = sorted(range(len(scores)), key=lambda row: -scores[row])
    groups = [list(group) for _, group in groupby(ranking, key=lambda row: scores[row])]
    found, before, rank = dict.fromkeys(lengths, Fraction(0)), 0, None
    for group in groups:
        size, hits = len(group), sum(row in right for row in group)
        for k in lengths:
            found[k] += Fraction(hits * min(max(k - before, 0), size), size)
        if hits and rank is None:
            chances = [
                Fraction(math.comb(size - place, hits - 1), math.comb(size, hits)) for place in range(1, size + 1)
            ]
            rank = sum(chance / (before + place) for place, chance in enumerate(chances, 1))
        before += size
    return [float(rank), *(float(found[k] / len(right)) for k in lengths)]


def test_retrieval_is_sorting_for_runs_in_any_order(world, blocks):
    runs, scores, asked, names = world
    wanted = {"q0": ["example 7"], "q1": ["example 0", "example 299"], "q2": ["example 65"], "q3": names[100:140]}
    queries = [Example(name, row, prompt=name, extra={"answers": wanted[name]}) for row, name in enumerate(asked)]
    found = together(runs)
    assert (found.queries, list(found.examples)) == (asked, names)
    right = right_examples(queries, "answers", found.queries, found.examples)
    lengths = [1, 5, 64, 300]
    expected = [
        slow_measures(row.tolist(), {names.index(one) for one in wanted[name]}, lengths)
        for name, row in zip(asked, scores, strict=True)
    ]
    for table in found.tables:
        assert _per_query(ties_of(table, right), lengths) == pytest.approx(np.array(expected), rel=1e-12)


def test_sums_are_those_of_whole_matrices_in_the_order_asked_for(world, blocks, tmp_path):
    runs, scores, asked, names = world
    random = np.random.default_rng(1)
    order = random.permutation(EXAMPLES)[:200]
    sets = random.random((20, 200)) < 0.5
    expected = sets.astype(np.float64) @ scores[::-1, order].astype(np.float64).T
    losses = random.normal(size=(20, QUERIES))
    everything = np.concatenate([np.ones((1, 200), dtype=bool), ~np.eye(4, 200, dtype=bool)])
    for one in runs:
        table = aligned(one.run, asked[::-1], [names[row] for row in order])
        assert table.shape == (QUERIES, 200)
        assert np.abs(summed(table, sets) - expected).max() < 1e-12 * np.abs(expected).max()
        assert np.array_equal([table.of_query(row) for row in range(QUERIES)], scores[::-1, order])
        whole = scores[::-1, order]
        found, matrix = (datamodeling_score(each, sets, losses, draws=20) for each in (table, whole))
        assert found.estimate == pytest.approx(matrix.estimate, rel=1e-12)
        predicted = effects(table, everything, losses[:5], np.arange(5)).predicted
        assert np.array_equal(predicted, whole[:, :4].T)


def test_the_same_order_needs_no_reordering(world):
    runs, _, asked, names = world
    assert aligned(runs[0].run, asked, names).places is None
    assert aligned(runs[1].run, asked, names).places is not None


def test_missing_ids_are_named(world, tmp_path):
    runs, scores, asked, names = world
    with pytest.raises(IndexMismatch, match=r"no scores for 2 of the 302 examples, such as 'new'"):
        aligned(runs[1].run, asked, [*names, "new", "newer"])
    with pytest.raises(IndexMismatch, match=r"no scores for 1 of the 1 queries, such as 'why'"):
        aligned(runs[1].run, ["why"], names)
    fewer = run_in(tmp_path / "fewer", scores[:, 1:], asked, names[1:])
    for pair in ((runs[0], fewer), (fewer, runs[0])):
        with pytest.raises(UserError, match="different queries or examples"):
            together(pair)


def test_scores_that_are_not_finite_are_refused(world, tmp_path):
    _, scores, asked, names = world
    scores[1, 200] = np.nan
    table = together([run_in(tmp_path / "broken", scores, asked, names)]).tables[0]
    with pytest.raises(DataError, match="not finite"):
        ties_of(table, [np.array([0])] * QUERIES)
    with pytest.raises(DataError, match="1 of the scores are not finite"):
        datamodeling_score(table, np.ones((5, EXAMPLES), dtype=bool), np.zeros((5, QUERIES)))


@pytest.fixture
def small_parts(monkeypatch):
    """What is held at a time weighs little beside what is held for each example."""
    for module, name in ((_aligned, "BLOCK_EXAMPLES"), (_ranking_measures, "BLOCK"), (_dense, "_IDS_AT_ONCE")):
        monkeypatch.setattr(module, name, 2048)
    monkeypatch.setattr(_dense, "_WINDOW", 2**14)


def peak_of(work, count):
    """Bytes at most of Python, NumPy and Arrow; those of Arrow never fall from one call to the next."""
    before, pool = pa.default_memory_pool(), pa.system_memory_pool()
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        work(count)
        return tracemalloc.get_traced_memory()[1] + pool.max_memory()
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(before)


def growth(work, few=20_000, many=200_000):
    """Bytes for each further example."""
    work(few)
    fewer = peak_of(work, few)
    return (peak_of(work, many) - fewer) / (many - few)


def test_retrieval_takes_no_memory_for_each_example(tmp_path, small_parts):
    queries = [Example(name, 0, prompt=name, extra={"answers": "example-77"}) for name in "pq"]

    def judge(count):
        runs = [tmp_path / f"{count}-{name}" for name in ("one", "other")]
        found = together([Scored(folder.name, Scores(folder, SimpleNamespace())) for folder in runs])
        right = right_examples(queries, "answers", found.queries, found.examples)
        return [_per_query(ties_of(table, right), [1, 10]) for table in found.tables]

    for count in (20_000, 200_000):
        scores = np.random.default_rng(0).random((2, count), dtype=np.float32)
        for name in ("one", "other"):
            run_in(tmp_path / f"{count}-{name}", scores, "pq", (f"example-{row}" for row in range(count)))
    assert growth(judge) < 0.5


def test_marks_are_read_window_by_window():
    marked = np.random.default_rng(0).random(200_003) < 0.1
    found = wrong_labels((Example(str(row), row, extra={"wrong": mark}) for row, mark in enumerate(marked)), "wrong")
    assert np.array_equal(found, marked)


def test_mislabel_takes_a_few_bytes_an_example(tmp_path, small_parts):
    settings = MislabelSettings(run=("run",), out=tmp_path, draws=3)

    def judge(count):
        record = SimpleNamespace(data=SimpleNamespace(examples=count), method="grad-dot")
        record.run = record
        scored = Scored("grad-dot", Scores(tmp_path / str(count), record))
        marked = (Example(str(row), row, extra={"wrong": row % 10 == 3}) for row in range(count))
        return _judgement(scored, wrong_labels(marked, "wrong"), settings)

    few, many = 100_000, 500_000
    for count in (few, many):
        order = np.random.default_rng(0).permutation(count)
        (tmp_path / str(count)).mkdir()
        table = pa.table({"example_id": order.astype(str), "row": order, "score": np.linspace(9, 0, count)})
        parquet.write_table(table, tmp_path / str(count) / "self_influence.parquet")
    assert growth(judge, few, many) < 9
