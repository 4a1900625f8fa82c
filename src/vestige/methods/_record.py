"""What a run of scores begins with, and its record: what was requested, what it was made from, what its scores mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from vestige import models, runs
from vestige.data import describe_focus
from vestige.distributed import FSDP
from vestige.errors import SpecError
from vestige.jobs import is_follower, is_worker, this_role
from vestige.methods import METHODS, Job, Method, compute_losses, get_method
from vestige.methods._plan import Member, digest, settings_key
from vestige.settings import AttributeSettings, LaunchSettings


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


def measure_query_losses(job: Job, method: Method) -> list[float] | None:
    """Return the loss of every query, None without a model."""
    if job.loaded is None:
        return None
    if (known := method.measured_losses(job)) is not None:
        return known
    return compute_losses(job.loaded.model, job.queries, job.settings.loss, job.token_budget).tolist()
