"""What is added to a run once its ranking is on disk: scores of components and of tokens, self-influence, checks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vestige import gradients, methods, models, runs
from vestige.distributed import broadcast_from_rank0
from vestige.errors import IndexMismatch
from vestige.lazy import torch
from vestige.methods import Job, Method, read_batches
from vestige.methods._plan import Member, compute_self_scores, run_here, vectors_key
from vestige.methods._randomise import run_checks
from vestige.methods._record import digest_inputs, make_record, make_tables
from vestige.progress import announce, progress
from vestige.settings import AttributeSettings

if TYPE_CHECKING:
    from torch import Tensor


Pairs = Sequence[tuple[int, int]]
"""(query, row) of every listed score."""
ROWS_AT_ONCE = 64
"""Training examples whose scores are split over components together: a few batches."""


@dataclass
class StoredRun:
    """A run on disk that may lack parts, and what they are made from."""

    job: Job
    method: Method
    tables: runs.RunTables
    record: runs.RunRecord
    """As it is on disk."""
    since: float
    """Reading of `time.perf_counter` up to which the record counts the seconds."""

    def add_missing(self) -> None:
        """Add one part after another; stopped at any moment, the run keeps those that were finished."""
        try:
            for part in self.record.missing:
                self._add(part, *self._compute(part))
        except BaseException:
            announce(f"{self.job.settings.out} holds what was finished. {self.record.describe_missing()}")
            raise

    def _compute(self, part: str) -> tuple[runs.RunTables | None, dict[str, Any]]:
        """Return the tables that hold the part, and the fields of the record that it changes."""
        job, method, tables = self.job, self.method, self.tables
        pairs = [(entry.query, entry.row) for entry in tables.ranked]
        match part:
            case "verbatim":
                from vestige.methods._stated import find_stated  # other runs do without

                return tables._replace(verbatim=find_stated(job)), {}
            case "components":
                return tables._replace(components=split_over_components(job, method, pairs)), {}
            case "tokens":
                return tables._replace(tokens=split_over_tokens(job, method, pairs)), {}
            case "self_influence":
                return tables._replace(self_scores=compute_self_scores(job, method)), {}
        checks = run_checks(job, method, tables.ranked, tables.losses)
        return None, {"trust": runs.TrustRecord(checks=[*checks, *self.record.trust.checks])}

    def _add(self, part: str, content: runs.RunTables | None, facts: dict[str, Any]) -> None:
        now = time.perf_counter()
        costs: dict[str, Any] = {"seconds": self.record.seconds + now - self.since}
        for name in ("peak_memory_bytes", "peak_gpu_memory_bytes"):
            costs[name] = max(runs.describe_process()[name], getattr(self.record, name))
        folder, before = self.job.settings.out, self.record
        self.record = broadcast_from_rank0(lambda: runs.add_part(folder, before, part, content, **costs, **facts))
        self.since = now


def requested_parts(settings: AttributeSettings, method: Method) -> list[str]:
    """Return what the settings request beside the ranking, in the order in which it is added."""
    requested = {
        "verbatim": settings.verbatim,
        "components": method.splits_components,
        "tokens": settings.tokens,
        "self_influence": settings.self_influence,
        "checks": settings.trust,
    }
    return [part for part, wanted in requested.items() if wanted]


def begin_run(
    settings: AttributeSettings,
    member: Member,
    losses: list[float] | None,
    since: float,
    add: Callable[[Path], None],
    **more: Any,
) -> StoredRun:
    """Write a run, with its ranking alone; `add` puts other folders into it, `more` are fields of its record."""
    job, method, summary = member
    tables, now = make_tables(job, summary.ranked, losses), time.perf_counter()
    record = make_record(settings, member, now - since, missing=requested_parts(settings, method), **more)

    def write() -> runs.RunRecord:
        dense = tables._replace(dense=summary.dense)
        return runs.read_record(
            runs.write_run(settings.out, record, dense, overwrite=settings.overwrite, add=add), checked=False
        )

    return StoredRun(job, method, tables, broadcast_from_rank0(write), now)


def take_up(job: Job, method: Method, begun: runs.RunRecord, started: float) -> StoredRun:
    """Return a run that lacks parts, as it is on disk.

    Raises:
        IndexMismatch: What it was made from has changed.
    """
    folder = job.settings.out
    if begun.inputs != digest_inputs(job):
        raise IndexMismatch(
            f"{folder} lacks parts, and the model, its answers, the data, the index or Vestige's version is another "
            "than when it was begun; nothing was changed. Bring it back, give another --out, or type --overwrite."
        )

    def read() -> tuple[list[runs.RankedScore], list[float] | None]:
        losses = runs.read_run_table(folder, "queries").sort_by("row")["loss"].to_pylist()
        ids = [query.id for query in job.queries.examples]
        return runs.read_ranked(folder, ids), None if job.loaded is None else losses

    announce(f"{folder} holds the ranking. Only what is missing is computed.")
    return StoredRun(job, method, make_tables(job, *broadcast_from_rank0(read)), begun, started)


def split_over_components(job: Job, method: Method, pairs: Pairs) -> list[runs.ComponentScores] | None:
    """Return the score of every pair, split over components; None for a method that has none."""
    if not method.splits_components:
        return None
    distinct = sorted(set(pairs))
    if not method.works_in_pieces:
        return _split_pairs(job, method, distinct)
    # Made before the bar: what they need may show one of its own.
    method.prepare(job)
    found, rows = list[runs.ComponentScores](), sorted({row for _, row in distinct})
    with progress(len(rows), "Scores of components") as bar:
        for start in range(0, len(rows), ROWS_AT_ONCE):
            part = set(rows[start : start + ROWS_AT_ONCE])
            found += _split_pairs(job, method, [pair for pair in distinct if pair[1] in part])
            bar.advance(len(part))
    return sorted(found, key=lambda one: (one.query, one.row))


def _split_pairs(job: Job, method: Method, pairs: Pairs) -> list[runs.ComponentScores]:
    queries, rows = torch.tensor([pair[0] for pair in pairs]), torch.tensor([pair[1] for pair in pairs])
    scores = method.components(job, queries, rows).double().cpu().numpy()
    return [runs.ComponentScores(query, row, part) for (query, row), part in zip(pairs, scores, strict=True)]


def split_over_tokens(job: Job, method: Method, pairs: Pairs) -> list[runs.TokenScores]:
    """Return the score of every pair, split over the tokens of the example: the effect of learning to predict each.

    An example's loss is a sum over its target tokens, so its gradient and every score that is linear in it are too.
    With v the vector whose inner product with the gradient is the score, the share of token t is `<v, grad loss_t>`:
    the derivative of that token's loss along v. Forward-mode differentiation gives it for all tokens at once.

    The scores of each query are kept beside the run until it is complete: after a kill the others alone are computed.
    """
    rows = [sorted({row for number, row in pairs if number == query}) for query in range(len(job.queries))]
    known = [(query, some, method.token_scores(job, query, some)) for query, some in enumerate(rows)]
    if all(scores is not None for _, _, scores in known):
        return [
            runs.TokenScores(query, row, each)
            for query, some, scores in known
            for row, each in zip(some, scores or (), strict=True)
        ]
    prepared = method.prepare(job)

    def compute(query: int) -> dict[str, Tensor]:
        found = sorted(_split_query(job, prepared, query, rows[query]), key=lambda one: one.row)
        return {str(one.row): torch.from_numpy(one.scores) for one in found}

    def collect(pieces: Iterator[dict[str, Tensor]]) -> list[runs.TokenScores]:
        return [
            runs.TokenScores(query, row, piece[str(row)].numpy())
            for query, piece in enumerate(pieces)
            for row in rows[query]
        ]

    weights = [len(each) for each in rows]
    return run_here(job, "Scores of tokens", vectors_key(prepared, rows), weights, compute, collect, "pairs")


def _split_query(job: Job, prepared: methods.Prepared, query: int, rows: Sequence[int]) -> Iterator[runs.TokenScores]:
    """Yield the scores of a query for some rows, split over tokens."""
    model, data = job.model_for(job.settings.method).model, job.train
    device = next(model.parameters()).device
    tangents: dict[str, Tensor] = {}
    for component, matrix in zip(job.components, prepared.direction(query), strict=True):
        parameter = model.get_parameter(component.parameter)
        tangent = tangents.setdefault(component.parameter, torch.zeros_like(parameter))
        models.parameter_view(model, component, tangent).copy_(matrix.to(device))
    norms = dict(zip(rows, prepared.row_norms(rows).tolist(), strict=True))
    weights = dict(zip(rows, prepared.row_weights(rows).tolist(), strict=True))
    wanted = np.asarray(rows, dtype=np.int64)
    for positions, batch in read_batches(model, data, job.token_budget, wanted):
        derivatives = gradients.token_derivatives(model, tangents, batch).double().cpu().numpy()
        for row, values in zip(wanted[positions].tolist(), derivatives, strict=True):
            count = max(int(data.target_counts[row]), 1) if job.settings.loss == "mean" else 1
            shares = values[: len(data.input_ids[row])] / count / (norms[row] or 1.0)
            yield runs.TokenScores(query, row, shares * weights[row])
