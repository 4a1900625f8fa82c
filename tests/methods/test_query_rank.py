"""`query_rank`: exact from the true rank on, the best approximation below it, refused where it would do nothing."""

import pytest
import torch

from tests.methods.conftest import all_scores, model_job, settings
from tests.reference.products import closest_of_rank
from tests.workshop import furnish
from vestige import attribute
from vestige.errors import SpecError
from vestige.gradients import low_rank, matrices_of
from vestige.methods import Ekfac, ExactGradients, GradCos, GradDot

PATTERNS = ("mlp", "attention")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("method", [GradDot, GradCos, Ekfac])
def test_the_full_rank_changes_no_score(name, method):
    exact = all_scores(method(), model_job(name, patterns=PATTERNS))
    ranked = all_scores(method(), model_job(name, patterns=PATTERNS, query_rank=48))
    assert torch.allclose(ranked, exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))


@pytest.mark.slow
def test_low_ranks_are_exact_once_they_reach_the_number_of_tokens():
    """The shortest query has 3 tokens, so every gradient of its matrices has rank 2 or less."""
    exact = all_scores(GradDot(), model_job("llama", patterns=PATTERNS))
    ranked = all_scores(GradDot(), model_job("llama", patterns=PATTERNS, query_rank=3))
    error = (ranked - exact).norm(dim=1) / exact.norm(dim=1)
    lengths = model_job("llama").queries.lengths
    assert int(lengths.min()) == 3
    assert float(error[int(lengths.argmin())]) < 1e-5
    assert float(error[int(lengths.argmax())]) > 1e-4


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_scores_are_those_of_the_closest_matrices(rank):
    job = model_job("gpt2", patterns=("mlp",), query_rank=rank)
    store = ExactGradients(job)
    queries, train = store.of_queries(job.queries), store.of_queries(job.train)
    expected = torch.zeros(len(job.queries), len(job.train), dtype=torch.float64)
    for part, query, rows in zip(job.components, queries, train, strict=True):
        closest = [closest_of_rank(one.view(part.shape), rank).flatten() for one in query]
        keeps = rank * sum(part.shape) >= part.size
        expected += (query.double() if keeps else torch.stack(closest)) @ rows.double().T
    found = all_scores(GradDot(), job)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_the_direction_of_a_query_is_what_it_is_scored_with():
    """Token shares are split along the direction, so they must sum to the shortened score."""
    job = model_job("gpt2", patterns=("mlp",), query_rank=1)
    store = ExactGradients(job)
    queries, train = store.of_queries(job.queries), store.of_queries(job.train)
    scores = all_scores(GradDot(), job)
    for query in range(len(job.queries)):
        direction = store.direction(queries, query)
        split = sum(rows.double() @ part.flatten().double() for rows, part in zip(train, direction, strict=True))
        assert torch.allclose(split, scores[query], rtol=1e-4, atol=1e-5 * float(scores.abs().max()))


def test_the_share_that_is_kept_is_measured():
    torch.manual_seed(0)
    matrices = torch.randn(3, 14, 9, dtype=torch.float64)
    matrices[1] = torch.randn(14, 2, dtype=torch.float64) @ torch.randn(2, 9, dtype=torch.float64)
    for rank in (1, 2, 3):
        found = low_rank(matrices, rank)
        left = matrices_of(found.gradients, slice(0, 3))
        lost = (matrices - left).flatten(1).square().sum(1) / matrices.flatten(1).square().sum(1)
        assert torch.allclose(found.kept, 1 - lost, atol=1e-12)
        for matrix, other in zip(matrices, left, strict=True):
            assert torch.allclose(other, closest_of_rank(matrix, rank), atol=1e-9)
    assert float(low_rank(matrices, 2).kept[1]) == pytest.approx(1, abs=1e-12)


def test_a_rank_that_saves_nothing_keeps_the_matrices():
    matrices = torch.randn(2, 6, 1)
    assert low_rank(matrices, 1).gradients.matrices is matrices


def test_refused_where_it_would_do_nothing(tmp_path):
    with pytest.raises(SpecError, match="an index holds compressed ones"):
        settings(index="idx", model=None, data=None, query_rank=4)
    furnish(tmp_path)
    given = {"model": str(tmp_path / "tiny-model"), "data": str(tmp_path / "train.jsonl"), "out": tmp_path / "run"}
    with pytest.raises(SpecError, match="bm25 uses none"):
        attribute(**given, queries=["Why?"], method="bm25", query_rank=4)
    with pytest.raises(SpecError, match="influence compresses these"):
        attribute(**given, queries=["Why is grass green?"], method="influence", query_rank=4)
