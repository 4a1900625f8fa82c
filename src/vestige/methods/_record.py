"""A run of scores: what is refused before it, its record, and what is added to it once its ranking is on disk."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vestige import gradients, methods, models, runs
from vestige.data import describe_focus
from vestige.distributed import FSDP, broadcast_from_rank0
from vestige.errors import IndexMismatch, SpecError
from vestige.jobs import is_follower, is_worker, this_role
from vestige.lazy import torch
from vestige.methods import METHODS, Job, Method, compute_losses, get_method, read_batches
from vestige.methods._plan import Member, compute_self_scores, digest, run_here, settings_key, vectors_key
from vestige.methods._randomise import run_checks
from vestige.progress import announce, progress
from vestige.settings import AttributeSettings, LaunchSettings

if TYPE_CHECKING:
    from torch import Tensor

Pairs = Sequence[tuple[int, int]]
"""(query, row) of every listed score."""
ROWS_AT_ONCE = 64
"""Training examples whose scores are split over components together: a few batches."""


def find_method(settings: AttributeSettings) -> Method:
    """Return the method; refuse before any work what it cannot do."""
    method = get_method(settings.method, **settings.options)
    if method.command != Method.command:
        raise SpecError(
            f"The method {settings.method} has a command of its own, with settings that `vestige attribute` lacks. "
            f"Type: vestige {method.command} --model MODEL --data FILE --queries FILE --out FOLDER"
        )
    if settings.device == FSDP and (not method.works_sharded or settings.tokens):
        able = ", ".join(each.name for each in METHODS if each.works_sharded)
        what = "--tokens" if settings.tokens else f"--method {settings.method}"
        raise SpecError(
            f"{what} differentiates the model in a way that FSDP2 does not know. With --device {FSDP} there are: "
            f"{able}, without --tokens. Or spread the layers over the GPUs of one process: "
            "--device balanced."
        )
    if settings.swept and not method.sweeps_damping:
        able = ", ".join(each.name for each in METHODS if each.sweeps_damping)
        raise SpecError(
            f"Several dampings were given, and {method.name} cannot score them in one pass: it has no damping, or "
            f"needs new measurements for each. Give one --damping, or type --method with one of: {able}."
        )
    _require_outputs(settings, method)
    if (settings.training is not None) != method.needs_training:
        able = ", ".join(each.name for each in METHODS if each.needs_training)
        raise SpecError(
            f"--training names a recorded training, which these methods follow: {able}. Drop it, or type one of them "
            "as --method."
            if settings.training is not None
            else f"The method {settings.method} follows a training. Type --training FOLDER, of `vestige train`."
        )
    without_model = all(
        given is None for given in (settings.index, settings.model, settings.checkpoints, settings.training)
    )
    if method.needs_model and without_model:
        raise SpecError(f"The method {settings.method} runs the model. Type --model MODEL, or --index FOLDER.")
    return method


def _require_outputs(settings: AttributeSettings, method: Method) -> None:
    """Raise unless the method can give what was requested beside its scores."""
    if settings.tokens and method.weighting is not None:
        raise SpecError(
            f"--tokens splits the score of one model, and {settings.method} adds up several. Drop --tokens, or ask one "
            "checkpoint: --model CHECKPOINT --method grad-dot or grad-cos."
        )
    if settings.tokens and not method.splits_tokens:
        raise SpecError(
            f"--tokens splits an example's score over its tokens, and {settings.method} cannot. Drop --tokens, or type "
            "--method influence, grad-dot or grad-cos."
        )
    if settings.engine != "local" and not (method.needs_gradients or method.needs_training):
        raise SpecError(
            f"--engine {settings.engine} submits passes over gradients, and {settings.method} uses none: it scores in "
            "this process. Drop --engine and what belongs to it."
        )
    if settings.query_rank is not None and not method.needs_gradients:
        raise SpecError(
            f"--query-rank shortens the queries' gradients, and {settings.method} uses none. Drop --query-rank, or "
            "type --method grad-dot, grad-cos or ekfac."
        )
    if settings.weigh_by is not None and (settings.self_influence or not method.weighs_rows):
        able = ", ".join(each.name for each in METHODS if each.weighs_rows)
        raise SpecError(
            "--self-influence is of an example's gradient as it is. Drop it, or --weigh-by."
            if settings.self_influence
            else f"--weigh-by multiplies gradients of examples, which these methods use: {able}. Drop it, or type one."
        )
    if settings.self_influence:
        method.require_self_scores()
    if settings.verbatim and (not method.needs_model or settings.device == FSDP):
        other = f"--device {FSDP}" if method.needs_model else f"--method {settings.method}"
        raise SpecError(f"--verbatim lets the model go on with training texts, and {other} generates none. Drop one.")


def find_begun(settings: AttributeSettings) -> runs.RunRecord | None:
    """Return the record of the run to which parts are to be added, None where one is to be begun.

    Raises:
        IndexMismatch: A run is there that is complete, or was begun with other settings.
    """
    # A worker never gets --overwrite: the process that a person started was, and writes the run.
    elsewhere = is_plain_worker() or is_follower()
    if not (settings.overwrite or elsewhere):
        ignored = {*LaunchSettings.model_fields, "out", "overwrite", "profile"}
        if (begun := runs.find_unfinished(settings.out, settings.record(), ignored=ignored)) is not None:
            return begun
    runs.check_target(settings.out, overwrite=settings.overwrite or elsewhere or is_worker())
    return None


def is_plain_worker() -> bool:
    """Return whether this process computes pieces alone; one that takes their result writes the run."""
    return this_role().kind == "worker"


def digest_inputs(job: Job) -> str:
    """Return a digest of what every part of the run is made from, beside the settings."""
    indexes = [job.index, *(each.index for each in job.checkpoints)]
    return digest(
        settings_key(job),
        job.train.fingerprint,
        job.loaded.fingerprint if job.loaded is not None else None,
        [index.fingerprint for index in indexes if index is not None],
    )


def make_tables(job: Job, ranked: Sequence[runs.RankedScore], losses: list[float] | None) -> runs.RunTables:
    """Return the content of a run, with its listed scores and the losses of its queries."""
    tokenizer = job.loaded.tokenizer if job.loaded is not None else None
    return runs.RunTables(job.train, job.queries, ranked, job.generated, losses, tokenizer)


def make_record(
    settings: AttributeSettings, member: Member, seconds: float, checks: Sequence[runs.Check] = (), **more: Any
) -> runs.RunRecord:
    """Return the record of a run with these scores; `more` are further fields of it."""
    job, method, summary = member
    meaning = method.meaning
    if settings.weigh_by is not None:
        weighed = f"{meaning.normalisation}; each example's gradient times its `{settings.weigh_by}`"
        meaning = replace(meaning, normalisation=weighed)
    checkpoints = [
        runs.CheckpointRecord(name=each.name, weight=each.weight, index=str(each.index.folder) if each.index else None)
        for each in job.checkpoints
    ]
    return runs.make_run_record(
        command=settings.command_line("attribute"),
        config=settings.record(),
        method=method.name,
        meaning=meaning,
        against_hubs=method.against_hubs,
        data=job.train,
        queries=job.queries,
        summary=summary,
        seconds=seconds,
        model=runs.describe_model(job.loaded) if job.loaded is not None else None,
        coverage=_describe_coverage(job.selection) if job.selection is not None else None,
        components=[part.name for part in job.components] if method.splits_components else [],
        checks=list(checks),
        asked=job.asked,
        explained=describe_focus(job.queries.examples),
        left_out=[job.train.examples[row].id for row in job.skipped],
        checkpoints=checkpoints,
        **more,
    )


def _describe_coverage(selection: models.Selection) -> runs.CoverageRecord:
    return runs.CoverageRecord(
        selected=selection.selected_parameters,
        total=selection.total_parameters,
        fraction=selection.fraction,
        skipped=[
            runs.SkippedRecord(name=row.name, parameters=row.parameters, reason=row.reason)
            for row in selection.coverage
            if not row.selected
        ],
    )


def measure_query_losses(job: Job, method: Method) -> list[float] | None:
    """Return the loss of every query, None without a model."""
    if job.loaded is None:
        return None
    if (known := method.measured_losses(job)) is not None:
        return known
    return compute_losses(job.loaded.model, job.queries, job.settings.loss, job.token_budget).tolist()


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
            case "checks":
                checks = run_checks(job, method, tables.ranked, tables.losses)
                return None, {"trust": runs.TrustRecord(checks=[*checks, *self.record.trust.checks])}
        raise ValueError(f"{part} is no part of a run")

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
