"""Scores of the training examples: pieces of the training data, each scored by the first free worker.

The query vectors are made once and kept beside the run; a piece leaves its scores there, and the reduce streams the
pieces in their order into the summary, so a run holds the same numbers whichever process computed them, and whenever.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from vestige import jobs, methods, models
from vestige.data import Example, StoredExamples
from vestige.distributed import broadcast_from_rank0
from vestige.errors import NonFinite
from vestige.lazy import torch
from vestige.methods._protocol import GradientStore, Job, Method, watch
from vestige.runs import ScoreBlock, ScoreCollector, ScoreSummary
from vestige.settings import LaunchSettings
from vestige.storage import partial_folder

FORMAT = 2
"""Raised when a piece of the same settings changes, if only by a bit: all pieces of a run are computed alike."""
OF_THE_OUTPUT = frozenset(
    {"out", "k", "dense", "tokens", "trust", "self_influence", "profile", "overwrite", "verbatim", "verbatim_tokens"}
)
"""Settings that change no score: a piece made with others stays good."""

Result = TypeVar("Result")
Blocks = Callable[[int], Iterator[ScoreBlock]]
"""From the number of a piece to its scores."""


class Member(NamedTuple):
    """The scores at one damping."""

    job: Job
    method: Method
    summary: ScoreSummary


def summarise(
    job: Job, method: Method, sets: int = 1, watch: Callable[[ScoreBlock], None] | None = None
) -> list[ScoreSummary]:
    """Stream the scores of every training example into the lists, the distribution and the groups of each set.

    Args:
        job: The question.
        method: Whose blocks have `sets * queries` lines.
        sets: How often the queries come, one set of lines after another.
        watch: Also gets every block.
    """

    def collect(blocks: Iterable[ScoreBlock]) -> list[ScoreSummary]:
        options = {"k": job.settings.k, "dense": job.settings.dense, "skipped": job.skipped}
        collectors = [
            ScoreCollector(len(job.queries), len(job.train), sources=_sources(job.train.examples), **options)
            for _ in range(sets)
        ]
        for block in blocks:
            if watch is not None:
                watch(block)
            for number, collector in enumerate(collectors):
                own = slice(number * len(job.queries), (number + 1) * len(job.queries))
                collector.add(ScoreBlock(block.rows, block.scores[own]))
        return [collector.finish() for collector in collectors]

    if not method.works_in_pieces:
        return collect(method.blocks(job))
    store = method.store(job)
    prepared, lines = _share_queries(job, method, store), sets * len(job.queries)
    key = vectors_key(prepared)
    return _run(job, "Scoring", "train x query pairs", store, lines, lambda: prepared.piece_blocks, collect, key)


def _sources(examples: Sequence[Example]) -> Iterable[str | None]:
    if isinstance(examples, StoredExamples):
        return examples.column("source")
    return (example.source for example in examples)


def compute_self_scores(job: Job, method: Method) -> np.ndarray:
    """Compute the score of every training example for itself, float64 [example]; NaN if left out.

    Raises:
        NonFinite: Another is NaN or infinite.
    """

    def collect(blocks: Iterable[ScoreBlock]) -> np.ndarray:
        found = np.full(len(job.train), np.nan)
        for block in blocks:
            rows, scores = block.arrays()
            kept = ~np.isin(rows, job.skipped)
            rows, scores = rows[kept], scores[0, kept]
            if (bad := np.flatnonzero(~np.isfinite(scores))).size:
                raise NonFinite(
                    f"The self-influence of training row {rows[bad[0]]} is {scores[bad[0]]}. Run again with "
                    "--precision float32, or leave that row out: --skip-bad, of vestige index where there is one."
                )
            found[rows] = scores
        return found

    if not method.works_in_pieces:
        return collect(method.self_scores(job))
    store, key = method.store(job), settings_key(job)
    blocks = partial(method.self_blocks, job)
    return _run(job, "Self-influence", "examples", store, 1, blocks, collect, digest(key, store.identity))


def find_unscorable(job: Job) -> tuple[int, ...]:
    """Return the training rows whose loss or gradient is not finite, by a pass over the data."""
    store = methods.ExactGradients(job)

    def blocks(piece: int) -> Iterator[ScoreBlock]:
        for rows, finite in store.piece_finite(piece):
            yield ScoreBlock(rows, finite[None].float())

    def collect(found: Iterable[ScoreBlock]) -> tuple[int, ...]:
        return tuple(sorted(row for block in found for row in block.rows[block.scores[0] == 0].tolist()))

    key = digest(settings_key(job), store.identity)
    return _run(job, "Checking", "examples", store, 1, lambda: blocks, collect, key)


def _run(
    job: Job,
    name: str,
    unit: str,
    store: GradientStore,
    lines: int,
    open_blocks: Callable[[], Blocks],
    collect: Callable[[Iterable[ScoreBlock]], Result],
    key: str,
) -> Result:
    """Collect score blocks with `lines` scores an example, piece by piece of the store.

    A single piece leaves nothing on disk here; several continue where they were killed.
    """
    rows = [store.piece_rows(piece) for piece in range(store.pieces)]
    weights = [count * lines for count in rows]
    if len(rows) == 1 and job.settings.engine == "local":
        with jobs.phase(name, unit) as done:
            done.append(weights[0])
            return collect(watch(open_blocks()(0), rows[0], name))

    def begin() -> AbstractContextManager[Callable[[int], jobs.Tensors]]:
        return nullcontext(partial(compute, open_blocks()))

    def compute(blocks: Blocks, piece: int) -> jobs.Tensors:
        found = []
        for block in blocks(piece):
            found.append(block)
            jobs.step_done(len(block.rows) * lines)
        return {
            "rows": torch.cat([each.rows for each in found]),
            "scores": torch.cat([each.scores for each in found], dim=1),
        }

    files = open_files(job.settings.out, name, digest(key, rows, lines), len(rows))
    pieces = jobs.tensor_pieces(
        name, files, weights, begin, lambda found: collect(ScoreBlock(**each) for each in found), unit=unit
    )
    with nullcontext() if job.loaded is None else models.leave_card(job.loaded.model, job.settings):
        return jobs.run_with_rate(pieces, job.settings, jobs.worker_command(job.settings, "attribute"))


def _share_queries(job: Job, method: Method, store: GradientStore) -> methods.Prepared:
    """Return the query vectors; those of data in several pieces are kept beside the run.

    Of several processes that start at once, one writes and all read the same bytes: computed twice they may be rounded
    differently, and scores of one run must come from the same vectors.
    """
    if store.pieces == 1:
        return method.prepare(job)

    def compute(_: int) -> jobs.Tensors:
        prepared = method.prepare(job)
        vectors = {str(number): vector for number, vector in enumerate(prepared.vectors)}
        return {"cosine": torch.tensor(prepared.cosine), **vectors}

    def collect(pieces: Iterator[jobs.Tensors]) -> methods.Prepared:
        kept = next(pieces)
        cosine = bool(kept.pop("cosine"))
        vectors = [kept[str(number)].to(store.device) for number in range(len(kept))]
        return methods.Prepared(job, store, vectors, cosine=cosine)

    key = digest(settings_key(job), store.identity)
    files = open_files(job.settings.out, "Queries", key, 1)
    if not broadcast_from_rank0(lambda: files.is_done(0)):
        # Before, because the curvature is a job of its own, in which this process may be a worker.
        method.prepare(job)
    return run_here(job, "Queries", key, [len(job.queries)], compute, collect, "queries")


def run_here(
    job: Job,
    name: str,
    key: str,
    weights: Sequence[int],
    compute: Callable[[int], jobs.Tensors],
    collect: Callable[[Iterator[jobs.Tensors]], Result],
    unit: str,
) -> Result:
    """Return what pieces are collected to that this process computes, each kept beside the run until it is written."""
    files = open_files(job.settings.out, name, key, len(weights))
    pieces = jobs.tensor_pieces(name, files, weights, lambda: nullcontext(compute), collect, unit=unit)
    return jobs.run_pieces(pieces, LaunchSettings.model_validate({}), None)


def open_files(out: Path, name: str, key: str, pieces: int) -> jobs.PieceFiles:
    """Return the files of some pieces beside the run at `out`, of which none is damaged."""
    files = jobs.PieceFiles(partial_folder(out) / name.lower().replace(" ", "-"), key)
    files.forget_damaged(range(pieces))
    return files


def vectors_key(prepared: methods.Prepared, *more: Any) -> str:
    """Return a digest of what scores are made from, the query vectors to the byte; `more` is what else they are of."""
    whole = hashlib.sha256()
    for vector in prepared.vectors:
        whole.update(vector.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest(settings_key(prepared.job), prepared.store.identity, whole.hexdigest(), *more)


def settings_key(job: Job) -> str:
    """Return a digest of all that the scores of a job depend on, but for the data and the model themselves."""
    ignored = OF_THE_OUTPUT | set(LaunchSettings.model_fields)
    recorded = {name: value for name, value in job.settings.record().items() if name not in ignored}
    return digest(FORMAT, version("vestige"), recorded, job.queries.fingerprint, len(job.queries))


def digest(*parts: Any) -> str:
    """Return the sha256 of anything that JSON can express."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
