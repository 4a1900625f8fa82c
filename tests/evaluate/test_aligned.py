"""Scores read in other orders and under others' ids, and ranked with ties, against whole matrices."""

import math
from fractions import Fraction
from itertools import groupby

import numpy as np
import pytest
import torch

from vestige.data import Example, TokenizedData
from vestige.errors import DataError, IndexMismatch, UserError
from vestige.evaluate import (
    Scored,
    align_scores,
    compute_effects,
    count_ties,
    datamodeling_score,
    find_right_examples,
    read_together,
    read_wrong_labels,
    recall_after,
    reciprocal_rank,
    sum_over_sets,
)
from vestige.runs import (
    CoverageRecord,
    DataRecord,
    Meaning,
    RunRecord,
    RunTables,
    ScoreBlock,
    ScoreCollector,
    Scores,
    TrustRecord,
    write_run,
)

QUERIES, EXAMPLES = 4, 300


def tokens(names):
    ids = [np.array([1], dtype=np.int32)] * len(names)
    examples = [Example(name, row, prompt=name, completion=name) for row, name in enumerate(names)]
    return TokenizedData(examples, ids, [np.ones(1, dtype=bool)] * len(names), np.zeros(len(names), dtype=bool), "f")


def run_in(folder, scores, queries, examples):
    """Write a run with these scores."""
    collector = ScoreCollector(*scores.shape, k=2, sources=[None] * len(examples), dense=True)
    collector.add(ScoreBlock(torch.arange(len(examples)), torch.tensor(scores)))
    summary = collector.finish()
    record = RunRecord(
        vestige="0.1.0",
        created="2025-01-01T00:00:00+00:00",
        command="vestige attribute",
        config={},
        versions={},
        model=None,
        data=DataRecord(name="d", fingerprint="f", examples=len(examples)),
        queries=DataRecord(name="q", fingerprint="f", examples=len(queries)),
        method=folder.name,
        meaning=Meaning(*("positive: good", "nats", "this model", "none", "an effect", "one pass", "often")),
        coverage=CoverageRecord(selected=1, total=1, fraction=1.0, skipped=[]),
        components=["one"],
        seconds=1.0,
        peak_memory_bytes=1,
        trust=TrustRecord(checks=[]),
        distribution=dict(zip(queries, summary.distribution, strict=True)),
        groups=dict(zip(queries, summary.groups, strict=True)),
    )
    content = RunTables(tokens(examples), tokens(queries), summary.ranked, [False] * len(queries), dense=summary.dense)
    return Scored(folder.name, Scores.open(write_run(folder, record, content)))


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


def test_retrieval_is_sorting_for_runs_in_any_order(world):
    runs, scores, asked, names = world
    wanted = {"q0": ["example 7"], "q1": ["example 0", "example 299"], "q2": ["example 65"], "q3": names[100:140]}
    given = [Example(name, row, prompt=name, extra={"answers": wanted[name]}) for row, name in enumerate(asked)]
    queries, examples, tables = read_together(runs)
    assert (queries, list(examples)) == (asked, names)
    right = find_right_examples(given, "answers", queries, examples)
    lengths = [1, 5, 64, 300]
    expected = [
        slow_measures(row.tolist(), {names.index(one) for one in wanted[name]}, lengths)
        for name, row in zip(asked, scores, strict=True)
    ]
    for table in tables:
        ties = [count_ties(table.of_query(query), rows) for query, rows in enumerate(right)]
        found = [[reciprocal_rank(each), *recall_after(each, lengths)] for each in ties]
        assert found == [pytest.approx(row, rel=1e-12) for row in expected]


def test_sums_are_those_of_whole_matrices_in_the_order_asked_for(world):
    runs, scores, asked, names = world
    random = np.random.default_rng(1)
    order = random.permutation(EXAMPLES)[:200]
    sets = random.random((20, 200)) < 0.5
    expected = sets.astype(np.float64) @ scores[::-1, order].astype(np.float64).T
    losses = random.normal(size=(20, QUERIES))
    everything = np.concatenate([np.ones((1, 200), dtype=bool), ~np.eye(4, 200, dtype=bool)])
    for one in runs:
        table = align_scores(one.run, asked[::-1], [names[row] for row in order])
        assert table.shape == (QUERIES, 200)
        assert np.abs(sum_over_sets(table, sets) - expected).max() < 1e-12 * np.abs(expected).max()
        assert np.array_equal([table.of_query(row) for row in range(QUERIES)], scores[::-1, order])
        whole = scores[::-1, order]
        found, matrix = (datamodeling_score(each, sets, losses, draws=20) for each in (table, whole))
        assert found.estimate == pytest.approx(matrix.estimate, rel=1e-12)
        predicted = compute_effects(table, everything, losses[:5], np.arange(5)).predicted
        assert np.array_equal(predicted, whole[:, :4].T)


@pytest.mark.slow
def test_many_examples_are_read_a_block_at_a_time(tmp_path):
    count = 150_000
    scores = np.random.default_rng(0).random((2, count), dtype=np.float32)
    names = [f"e{row}" for row in range(count)]
    table = align_scores(run_in(tmp_path / "run", scores, ["p", "q"], names).run, ["q", "p"], names[::-1])
    sizes = [part.shape[1] for _, part in table.blocks()]
    assert sum(sizes) == count
    assert max(sizes) <= 2**16
    assert sum_over_sets(table, np.ones((1, count), dtype=bool))[0] == pytest.approx(scores[::-1].sum(1), rel=1e-4)


def test_missing_ids_are_named(world, tmp_path):
    runs, scores, asked, names = world
    with pytest.raises(IndexMismatch, match=r"no scores for 2 of the 302 examples, such as 'new'"):
        align_scores(runs[1].run, asked, [*names, "new", "newer"])
    with pytest.raises(IndexMismatch, match=r"no scores for 1 of the 1 queries, such as 'why'"):
        align_scores(runs[1].run, ["why"], names)
    fewer = run_in(tmp_path / "fewer", scores[:, 1:], asked, names[1:])
    for pair in ((runs[0], fewer), (fewer, runs[0])):
        with pytest.raises(UserError, match="different queries or examples"):
            read_together(pair)


def test_scores_that_are_not_finite_are_refused(world):
    _, scores, _, _ = world
    scores[1, 200] = np.nan
    with pytest.raises(DataError, match="not finite"):
        count_ties(scores[1], np.array([0]))
    with pytest.raises(DataError, match="1 of the scores are not finite"):
        datamodeling_score(scores, np.ones((5, EXAMPLES), dtype=bool), np.zeros((5, QUERIES)))


def test_marks_are_read_from_the_column():
    marked = np.random.default_rng(0).random(2_003) < 0.1
    found = read_wrong_labels(
        (Example(str(row), row, extra={"wrong": mark}) for row, mark in enumerate(marked)), "wrong"
    )
    assert np.array_equal(found, marked)
