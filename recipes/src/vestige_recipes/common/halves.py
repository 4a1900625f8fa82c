"""What studies of banks of halves share: the bank of a plain module, scores with their price, and their judgement."""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from torch import Tensor, nn

from vestige.banks import Bank, bank_of
from vestige.curvature import DAMPING, FisherBlocks, accumulate_fisher
from vestige.evaluate import Lds, datamodeling_score
from vestige.jobs import worker_command
from vestige.progress import progress
from vestige_recipes.studies import StudySettings

AT_ONCE = 100
"""Examples of a backward pass."""
Matrix = Float[np.ndarray, "query example"]


class Scored(NamedTuple):
    """What one method found."""

    name: str
    scores: Matrix
    seconds: float
    """With the gradients that it needs; without the training of models."""
    numbers: int
    """Kept of each training example, all models together."""
    nrmse: float | None = None
    """Root mean square error of the cosines that a sketch gives."""
    draw: int = 0
    """Which draw of a sketch: all of one name differ in their seeds alone."""


def time_scores(name: str, compute: Callable[[], Tensor], numbers: int, before: float = 0.0) -> Scored:
    """Return what `compute` returns, with its seconds and those `before`."""
    started = time.perf_counter()
    scores = compute().double().numpy()
    return Scored(name, scores, before + time.perf_counter() - started, numbers)


def score_solved(
    name: str, solve: Callable[[], Float[Tensor, "query n"]], train: Float[Tensor, "example n"], before: float
) -> Scored:
    """Return the inner products of the training rows with what `solve` makes of the queries."""
    return time_scores(name, lambda: solve() @ train.T, train.shape[1], before)


def cosines(queries: Float[Tensor, "query n"], train: Float[Tensor, "example n"]) -> Float[Tensor, "query example"]:
    """Return the cosine of every pair; 0 where one is zero."""
    lengths = queries.norm(dim=1)[:, None] * train.norm(dim=1)
    return queries @ train.T / lengths.clamp(min=1e-30)


def fisher_of_rows(rows: Float[Tensor, "example column"]) -> FisherBlocks:
    """Return one matrix of all columns."""
    return accumulate_fisher(["model"], [slice(0, rows.shape[1])], rows.split(AT_ONCE))


def solve_rows(
    queries: Float[Tensor, "query column"], train: Float[Tensor, "example column"], added: float | None = None
) -> Float[Tensor, "query column"]:
    """Precondition queries with the Fisher matrix of the training rows, at the default damping or with a number added.

    The former is relative to the mean eigenvalue.
    """
    fisher, damping = fisher_of_rows(train), DAMPING
    if added is not None:
        fisher, damping = fisher.in_unit_of_one(), added
    return fisher.precondition(queries, damping)


def make_bank(
    settings: StudySettings,
    train: Callable[[np.ndarray, int], np.ndarray],
    examples: int,
    queries: int,
    subsets: int,
    identity: Mapping[str, Any],
) -> Bank:
    """Return models of halves, which `train` makes from rows and a seed; `identity` is what else decides them."""
    return bank_of(
        train,
        examples=examples,
        queries=queries,
        out=settings.out / "bank",
        settings=identity,
        subsets=subsets,
        seeds=settings.seeds,
        seed=settings.seed,
        launch=settings,
        command=worker_command(settings, "study"),
    )


def train_halves(fit: Callable[[np.ndarray, int], nn.Module], examples: int, models: int, seed: int) -> list[nn.Module]:
    """Return models of random halves, by rows and the seeds after `seed`, that of the model which is asked."""
    made = []
    with progress(models, "Models of halves", unit="models") as counter:
        for number in range(seed + 1, seed + 1 + models):
            rows = np.random.default_rng(number).permutation(examples)[: examples // 2]
            made.append(fit(np.sort(rows), number))
            counter.advance()
    return made


def judge_scores(
    scores: Matrix, truth: Bank, draws: int, *, queries: Any = slice(None), members: Any = slice(None)
) -> Lds:
    """Return how well scores predict retraining: on all queries and models of a bank, or on some of them."""
    return datamodeling_score(
        scores[queries],
        truth.membership[members],
        truth.query_losses[members][:, queries],
        subset=truth.subsets[members],
        seeds=truth.seeds[members],
        draws=draws,
    )
