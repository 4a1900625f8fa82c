"""Does the ranking depend on what the model learned? The same method on the same model without its knowledge."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from shutil import copytree, rmtree
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int

from vestige import gradients, indexes, methods
from vestige.distributed import broadcast_from_rank0
from vestige.errors import NonFinite
from vestige.jobs import run_pieces
from vestige.lazy import torch
from vestige.methods import Job, Method, digest, get_method
from vestige.methods._trust import check_knowledge, make_check, run_free_checks
from vestige.progress import progress, quiet
from vestige.runs import Check, RankedScore, sample_rows
from vestige.settings import LaunchSettings
from vestige.storage import partial_folder

if TYPE_CHECKING:
    from torch import Tensor, nn

ROWS = 10
"""Training rows that are compared. A ranking that needs no learning correlates near 1 on any number of them; one that
has nothing to do with it has a standard error of 1/3 for each query and, over two, of 1/4, so that it is beyond 0.5 or
-0.5 once in twenty times. Each row costs a forward and a backward pass, once for an index."""

QUERIES, FEWEST_ROWS = 2, 8
CHECKS = "checks"
"""Folder in an index that keeps the gradients of these rows under random weights: they depend on the index alone."""

CORRELATION_WARNS = 0.5
"""Above it, more than a quarter of the ranks' variance is explained without any learned weight. Some agreement is
expected of any method: length and shared tokens shape gradients whatever the weights are."""

_STEPS = 4
"""The free checks, what the model knows, scores under its own weights and under random ones."""

CORRELATION_NAME = "randomised-model correlation"


def run_checks(job: Job, method: Method, ranked: Sequence[RankedScore], losses: Sequence[float] | None) -> list[Check]:
    """Run the check on randomised weights, where the method runs a model, and the free checks."""
    if method.needs_training or job.loaded is None or not method.needs_model:
        follows = "The method follows a recorded training, which noise did not have."
        reading = follows if method.needs_training else "The method does not use the model's weights."
        checks = [*method.checks(job), *run_free_checks(job, method, ranked, losses=losses)]
        return [make_check(CORRELATION_NAME, None, reading), *checks]
    rows = np.setdiff1d(sample_rows(len(job.train), ROWS), job.skipped)
    queries = sample_rows(len(job.queries), QUERIES)
    with progress(_STEPS, "Trust checks", unit="steps") as bar:
        checks = [*method.checks(job), *run_free_checks(job, method, ranked, losses=losses)]
        bar.advance()
        known = _measure_knowledge(job, rows)
        bar.advance()

        def score(*, randomised: bool = False) -> Float[Tensor, "query row"]:
            with quiet():
                if randomised or not method.works_in_pieces:
                    found = score_sample(job, rows, queries, randomised=randomised)
                else:
                    scores = method.prepare(job).totals(rows.tolist())
                    found = scores[torch.from_numpy(queries).to(scores.device)].cpu()
            bar.advance()
            return found

        correlation = check_randomised(job.loaded.model, score, len(rows), knowledge=known, seed=job.settings.seed)
    about = (
        f" Measured on {len(rows)} of {len(job.train):,} examples and {len(queries)} of {len(job.queries):,} queries."
    )
    correlation = correlation.model_copy(update={"reading": correlation.reading + about})
    return [correlation, *([] if known is None else [check_knowledge(known)]), *checks]


def _measure_knowledge(job: Job, rows: Int[np.ndarray, "row"]) -> gradients.Knowledge | None:
    """Return what the model knows of some training rows, from the losses that an index stores where there is one."""
    model, data = job.model_for(job.settings.method).model, job.train.subset(rows)
    index = job.index or (job.checkpoints[-1].index if job.checkpoints else None)
    # Of an imported one no losses were published.
    if index is None or index.manifest.imported is not None:
        return gradients.measure_knowledge(model, data, job.token_budget)
    losses = index.losses_and_norms()[0].double().numpy()[rows]
    if job.settings.loss == "mean":
        losses = losses * data.target_counts
    return gradients.measure_knowledge(model, data, job.token_budget, losses=losses)


def check_randomised(
    model: nn.Module,
    score: Callable[..., Float[Tensor, "query row"]],
    rows: int,
    *,
    knowledge: gradients.Knowledge | None = None,
    seed: int = 0,
) -> Check:
    """Check the mean Spearman correlation, over a few queries, of scores with those from randomised weights.

    The sanity check of Adebayo et al. (2018) for saliency maps, as quanda applies it to attribution: scores that stay
    the same when all knowledge is gone were never about the knowledge.

    Args:
        model: Whose weights are replaced by noise for the second of two calls of `score`.
        score: The method on a sample of the training rows, with everything that it measures on the model; it is called
            with `randomised=True` where the weights are noise.
        rows: The number of these rows.
        knowledge: Of a model that has learned nothing the scores say nothing, however they change with its weights.
        seed: Of the noise.
    """
    if rows < FEWEST_ROWS:
        return make_check(CORRELATION_NAME, None, "There are too few training examples to correlate.")
    if not all(parameter.is_floating_point() for parameter in model.parameters()):
        return make_check(CORRELATION_NAME, None, "The weights are quantised, and noise does not replace packed ones.")
    learned = score()
    try:
        with methods.randomise(model, seed):
            random = score(randomised=True)
    except NonFinite:
        # Noise may overflow where learned weights do not: that says nothing about the scores.
        random = torch.full_like(learned, torch.nan)
    found = map(_spearman, learned.double().cpu().numpy(), random.double().cpu().numpy())
    check = _judge_correlations([value for value in found if value is not None])
    if check.verdict == "warn" or knowledge is None or knowledge.learned:
        return check
    value = "" if check.value is None else f" (rank correlation {check.value:.2f})"
    reading = (
        f"The model has learned nothing of these texts, so random weights in place of its own{value} prove nothing."
    )
    return check.model_copy(update={"reading": reading, "verdict": "warn"})


def _judge_correlations(known: Sequence[float]) -> Check:
    if not known:
        reading = "The scores are all equal, or not finite on the randomised model, so they cannot be correlated."
        return make_check(CORRELATION_NAME, None, reading)
    value = float(np.mean(known))
    reading = f"Scores from randomised weights agree with these at a rank correlation of {value:.2f}"
    if abs(value) > CORRELATION_WARNS:
        return make_check(CORRELATION_NAME, value, f"{reading}: much of the ranking needs no learning.", "warn")
    return make_check(CORRELATION_NAME, value, f"{reading}: the ranking depends on what was learned.", "good")


def _spearman(one: Float[np.ndarray, "row"], other: Float[np.ndarray, "row"]) -> float | None:
    # A constant side has no ranks to correlate.
    if np.ptp(one) == 0 or np.ptp(other) == 0 or not (np.isfinite(one).all() and np.isfinite(other).all()):
        return None
    return float(np.corrcoef(_mean_ranks(one), _mean_ranks(other))[0, 1])


def _mean_ranks(values: Float[np.ndarray, "row"]) -> Float[np.ndarray, "row"]:
    """Return the ranks, equal values sharing their mean, as `scipy.stats` does, which takes 0.3 s to import."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def score_sample(
    job: Job, rows: Int[np.ndarray, "row"], queries: Int[np.ndarray, "query"], *, randomised: bool = False
) -> Float[Tensor, "query row"]:
    """Return the scores of `rows` for `queries` by the job's method, as if these rows were all its training data.

    Index, curvature, projections and query vectors are made again from the model as it is: what was measured on other
    weights would carry their knowledge into the scores. The gradients under random weights are kept in the index that
    they imitate. Of several checkpoints the last one counts alone.

    Args:
        job: The question of the run.
        rows: Training rows.
        queries: Rows of the queries.
        randomised: Whether the weights were replaced by noise, so that no file beside them belongs to them.
    """
    folder, settings = partial_folder(job.settings.out) / "check", job.settings
    here = {name: field.get_default() for name, field in LaunchSettings.model_fields.items()}
    small = replace(
        job,
        train=job.train.subset(rows),
        queries=job.queries.subset(queries),
        settings=settings.model_copy(update={**here, "out": folder / "run", "skip_bad": False}),
        left_out=(),
        row_weights=None if job.row_weights is None else job.row_weights[rows],
        randomised=randomised,
    )
    method = get_method(settings.method, **settings.options)
    scores = torch.zeros(len(queries), len(rows), dtype=torch.float64)
    with quiet(), _use_folder(folder):
        if job.index is not None and not method.needs_exact:
            small = replace(small, index=_index_sample(small, job.index, rows, folder / "index"))
        if job.checkpoints:
            last = job.checkpoints[-1]
            stored = last.index and _index_sample(small, last.index, rows, folder / "index")
            small = replace(small, checkpoints=(replace(last, index=stored, weight=1.0),))
        for block in method.blocks(small):
            scores[:, torch.as_tensor(block.rows)] = torch.as_tensor(block.scores).double().cpu()
    return scores


def _index_sample(job: Job, like: indexes.Index, rows: Int[np.ndarray, "row"], folder: Path) -> indexes.Index:
    """Return an index, in the folder, of the job's training data, which are these rows of `like`.

    Under random weights it is a copy of what `like` keeps: what is measured on it does not stay there.
    """
    if not (job.randomised and broadcast_from_rank0(lambda: os.access(like.folder, os.W_OK))):
        return _build_index(job, like, folder)
    parts = version("vestige"), like.fingerprint, rows.tolist(), job.settings.seed, job.token_budget
    kept = _build_index(job, like, like.folder / CHECKS / digest(*parts))
    broadcast_from_rank0(lambda: copytree(kept.folder, folder))
    return indexes.Index.open(folder)


def _build_index(job: Job, like: indexes.Index, folder: Path) -> indexes.Index:
    """Return an index of the job's training data, compressed as `like` is; one that is there already is opened."""
    data = job.train
    draft = like.manifest.model_copy(
        update={
            "data": indexes.DataIdentity(name=data.name, fingerprint=data.fingerprint, examples=len(data)),
            "plan": indexes.PlanRecord(fewest_shards=1),
        }
    )
    if (trained := like.folder / indexes.TRAINED).is_dir():
        broadcast_from_rank0(lambda: copytree(trained, folder / trained.name, dirs_exist_ok=True))
    manifest, plan = broadcast_from_rank0(
        lambda: indexes.plan_index(
            folder, draft, data.lengths, lambda start, stop: indexes.fingerprint_rows(data, start, stop)
        )
    )

    @contextmanager
    def compute() -> Iterator:
        with methods.open_compressed(job, like, manifest.components) as gradients:
            yield lambda batches: gradients.parts(data, batches)

    work = indexes.IndexWork(folder, manifest, plan, data.examples, compute)
    broadcast_from_rank0(lambda: indexes.prepare_index(work))
    return run_pieces(work.pieces, LaunchSettings.model_validate({}), None)


@contextmanager
def _use_folder(folder: Path) -> Iterator[None]:
    """Remove the folder before, where a killed run left it, and after."""
    broadcast_from_rank0(lambda: rmtree(folder, ignore_errors=True))
    try:
        yield
    finally:
        broadcast_from_rank0(lambda: rmtree(folder, ignore_errors=True))
