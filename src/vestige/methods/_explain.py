"""The listed scores taken apart: over the model's components, and over the tokens of the training example."""

from collections.abc import Sequence

import numpy as np
import torch

from vestige.indexes import batch_tokens
from vestige.methods._prepared import GradientMethod, Prepared
from vestige.methods._protocol import Job, Method
from vestige.methods._token_scores import token_scores
from vestige.progress import progress
from vestige.runs import ComponentScores, TokenScores

Pairs = Sequence[tuple[int, int]]
"""(query, row) of every listed score."""


def split_over_components(job: Job, method: Method, pairs: Pairs) -> list[ComponentScores] | None:
    """Return the score of every pair, split over components; None for a method that has none."""
    if not method.splits_components:
        return None
    distinct = sorted(set(pairs))
    queries, rows = torch.tensor([pair[0] for pair in distinct]), torch.tensor([pair[1] for pair in distinct])
    block = method.components(job, queries, rows)
    scores = block.scores.double().cpu().numpy()
    return [ComponentScores(query, row, part) for (query, row), part in zip(distinct, scores, strict=True)]


def split_over_tokens(job: Job, method: Method, pairs: Pairs) -> list[TokenScores]:
    """Return the score of every pair, split over the tokens of the example."""
    assert isinstance(method, GradientMethod)
    prepared, distinct = method.prepare(job), sorted(set(pairs))
    found: list[TokenScores] = []
    with progress(len(distinct), "Token scores", unit="pairs") as bar:
        for query in range(len(job.queries)):
            rows = [row for number, row in distinct if number == query]
            found += _of_query(job, prepared, query, rows)
            bar.advance(len(rows))
    return found


def _of_query(job: Job, prepared: Prepared, query: int, rows: list[int]) -> list[TokenScores]:
    loaded = job.model_for(job.settings.method)
    shares = token_scores(
        loaded.model,
        job.components,
        prepared.direction(query),
        job.train,
        rows,
        job.settings.loss,
        batch_tokens(job.settings, loaded),
    )
    norms = dict(zip(rows, prepared.row_norms(rows).tolist(), strict=True))
    return [TokenScores(query, row, np.asarray(scores) / (norms[row] or 1.0)) for row, scores in shares]
