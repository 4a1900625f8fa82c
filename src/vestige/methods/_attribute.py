"""`vestige attribute`: from a question to the training examples behind its answer, as a run on disk."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from vestige import indexes, models
from vestige.data import describe_focus
from vestige.distributed import FSDP, broadcast_from_rank0, is_rank0
from vestige.errors import IndexMismatch, SpecError
from vestige.jobs import PROFILE_FILE, follow, is_follower, is_worker, profile, this_role, write_profile
from vestige.methods import METHODS, Job, Method, OnAnswers, compute_losses, get_method, open_job
from vestige.methods._parts import StoredRun, requested_parts, split_over_components
from vestige.methods._plan import Member, compute_self_scores, digest, settings_key, summarise
from vestige.methods._trust import describe_memorized, find_memorized, run_free_checks
from vestige.progress import announce
from vestige.runs import (
    RECORD_FILE,
    Check,
    CheckpointRecord,
    CoverageRecord,
    RankedScore,
    RunRecord,
    RunTables,
    Scores,
    SkippedRecord,
    add_part,
    check_target,
    describe_model,
    find_unfinished,
    is_complete,
    make_run_record,
    read_ranked,
    read_record,
    read_run_table,
    write_run,
)
from vestige.settings import AttributeSettings, LaunchSettings, with_settings
from vestige.storage import partial_folder, remove_partial, sha256_of

_POLL_SECONDS = 0.2


@with_settings(AttributeSettings)
def attribute(
    settings: AttributeSettings,
    on_answers: OnAnswers | None = None,
    on_ranking: Callable[[Scores], None] | None = None,
) -> Scores:
    """Rank the training examples behind an answer, with what the scores mean and how far to trust them.

    The run is on disk once the ranking is known; scores of components and tokens, self-influence and the trust checks
    are added to it one after another. Stopped in between, it says what it lacks, and the same call adds that.

    Args:
        settings: What to do.
        on_answers: Called with the queries, and whether each answer is the model's own, once they have answers.
        on_ranking: Called with the run once it is on disk with its ranking.

    Raises:
        UserError: Something about the model, the data, the settings or the disk needs the caller.
    """
    started = time.perf_counter()
    begun = broadcast_from_rank0(lambda: _find_begun(settings))
    method = _find_method(settings)
    if is_follower():
        follow(settings.out / RECORD_FILE, lambda: _score_elsewhere(settings, method))
        while not is_complete(settings.out):
            time.sleep(_POLL_SECONDS)
        return Scores.open(settings.out)
    if _is_plain_worker():
        # It ends in the job that it is for; met that nowhere, it is done already.
        _score_elsewhere(settings, method)
        raise SystemExit(0)
    with profile(settings.profile) as measured, open_job(settings, method, on_answers) as job:
        run = _begin(settings, job, method, started) if begun is None else _take_up(job, method, begun, started)
        if on_ranking is not None and is_rank0():
            on_ranking(Scores.open(settings.out))
        run.add_missing()

    def finish() -> None:
        if measured is not None:
            write_profile(measured, settings.out)
            digests = {**run.record.files, PROFILE_FILE: sha256_of(settings.out / PROFILE_FILE)}
            add_part(settings.out, run.record, "", files=digests)
        remove_partial(settings.out)

    broadcast_from_rank0(finish)
    return Scores.open(settings.out)


def _find_begun(settings: AttributeSettings) -> RunRecord | None:
    """Return the record of the run to which parts are to be added, None where one is to be begun.

    Raises:
        IndexMismatch: A run is there that is complete, or was begun with other settings.
    """
    # A worker never gets --overwrite: the process that a person started was, and writes the run.
    elsewhere = _is_plain_worker() or is_follower()
    if not (settings.overwrite or elsewhere):
        ignored = {*LaunchSettings.model_fields, "out", "overwrite", "profile"}
        if (begun := find_unfinished(settings.out, settings.record(), ignored=ignored)) is not None:
            return begun
    check_target(settings.out, overwrite=settings.overwrite or elsewhere or is_worker())
    return None


def _is_plain_worker() -> bool:
    """Return whether this process computes pieces alone; one that takes their result writes the run."""
    return this_role().kind == "worker"


def _begin(settings: AttributeSettings, job: Job, method: Method, started: float) -> StoredRun:
    """Rank the training examples, and write the run without the parts that are added to it."""
    members, checks = _score(job, method)
    main = members[0]
    losses = _query_losses(main.job, main.method)
    if losses is not None and (certain := find_memorized(job.queries, losses, settings.loss)):
        announce(describe_memorized(certain, len(job.queries)))
    tables = _make_tables(main.job, main.summary.ranked, losses)
    others = [_write_beside(settings, member, losses, started) for member in members[1:]]
    now = time.perf_counter()
    record = _make_record(
        settings,
        main,
        checks,
        now - started,
        missing=requested_parts(settings, method),
        inputs=_digest_inputs(job),
    )

    def move_others(run: Path) -> None:
        for folder in others:
            folder.rename(run / folder.name)

    def write() -> RunRecord:
        dense = tables._replace(dense=main.summary.dense)
        return read_record(
            write_run(settings.out, record, dense, overwrite=settings.overwrite, add=move_others), checked=False
        )

    return StoredRun(main.job, main.method, tables, broadcast_from_rank0(write), now)


def _take_up(job: Job, method: Method, begun: RunRecord, started: float) -> StoredRun:
    """Return a run that lacks parts, as it is on disk.

    Raises:
        IndexMismatch: What it was made from has changed.
    """
    if begun.inputs != _digest_inputs(job):
        raise IndexMismatch(
            f"{job.settings.out} lacks parts, and the model, its answers, the data, the index or Vestige's version is "
            "another than when it was begun; nothing was changed. Bring it back, give another --out, or type "
            "--overwrite."
        )
    if job.settings.swept:
        # Which of the dampings the run is at depends on those at which the curvature could be inverted.
        job, method, _ = _score(job, method)[0][0]

    def read() -> tuple[list[RankedScore], list[float] | None]:
        losses = read_run_table(job.settings.out, "queries").sort_by("row")["loss"].to_pylist()
        ids = [query.id for query in job.queries.examples]
        return read_ranked(job.settings.out, ids), None if job.loaded is None else losses

    announce(f"{job.settings.out} holds the ranking. Only what is missing is computed.")
    return StoredRun(job, method, _make_tables(job, *broadcast_from_rank0(read)), begun, started)


def _digest_inputs(job: Job) -> str:
    """Return a digest of what every part of the run is made from, beside the settings."""
    indexes = [job.index, *(each.index for each in job.checkpoints)]
    return digest(
        settings_key(job),
        job.train.fingerprint,
        job.loaded.fingerprint if job.loaded is not None else None,
        [index.fingerprint for index in indexes if index is not None],
    )


def _score(job: Job, method: Method) -> tuple[list[Member], list[Check]]:
    """Return the scores, at each damping, the run's own first; and the check that compares the dampings."""
    if job.settings.swept:
        from vestige.methods._sweep import sweep

        members, check = sweep(job, method)
        return members, [check]
    return [Member(job, method, summarise(job, method))], []


def _score_elsewhere(settings: AttributeSettings, method: Method) -> None:
    """Compute pieces for the process that writes the run: everything that is done in pieces."""
    with open_job(settings, method) as job:
        main = _score(job, method)[0][0]
        if settings.self_influence:
            compute_self_scores(main.job, main.method)


def _make_tables(job: Job, ranked: Sequence[RankedScore], losses: list[float] | None) -> RunTables:
    tokenizer = job.loaded.tokenizer if job.loaded is not None else None
    return RunTables(job.train, job.queries, ranked, job.generated, losses, tokenizer)


def _write_beside(settings: AttributeSettings, member: Member, losses: list[float] | None, started: float) -> Path:
    """Write the run of another damping beside the main one, until that is written; record how to make it alone.

    Of the checks it has those that need no model; tokens and self-influence are the main run's alone.
    """
    job, method, summary = member
    damping = job.settings.damping
    name = f"damping-{damping!r}".removesuffix(".0")
    own = {"damping": damping, "out": settings.out / name, "tokens": False, "self_influence": False}
    checks = run_free_checks(job, method, summary.ranked, losses=losses) if settings.trust else []
    pairs = [(entry.query, entry.row) for entry in summary.ranked]
    tables = _make_tables(job, summary.ranked, losses)._replace(
        components=split_over_components(job, method, pairs), dense=summary.dense
    )
    record = _make_record(settings.model_copy(update=own), member, checks, time.perf_counter() - started)
    return broadcast_from_rank0(partial(write_run, partial_folder(settings.out) / name, record, tables, overwrite=True))


def _make_record(
    settings: AttributeSettings, member: Member, checks: list[Check], seconds: float, **more: Any
) -> RunRecord:
    job, method, summary = member
    checkpoints = [
        CheckpointRecord(name=each.name, weight=each.weight, index=str(each.index.folder) if each.index else None)
        for each in job.checkpoints
    ]
    return make_run_record(
        command=settings.command_line("attribute"),
        config=settings.record(),
        method=method.name,
        meaning=method.meaning,
        against_hubs=method.against_hubs,
        data=job.train,
        queries=job.queries,
        summary=summary,
        seconds=seconds,
        model=describe_model(job.loaded) if job.loaded is not None else None,
        coverage=_describe_coverage(job.selection) if job.selection is not None else None,
        components=[part.name for part in job.components] if method.splits_components else [],
        checks=checks,
        asked=job.asked,
        explained=describe_focus(job.queries.examples),
        left_out=[job.train.examples[row].id for row in job.skipped],
        checkpoints=checkpoints,
        **more,
    )


def _describe_coverage(selection: models.Selection) -> CoverageRecord:
    return CoverageRecord(
        selected=selection.selected_parameters,
        total=selection.total_parameters,
        fraction=selection.fraction,
        skipped=[
            SkippedRecord(name=row.name, parameters=row.parameters, reason=row.reason)
            for row in selection.coverage
            if not row.selected
        ],
    )


def _find_method(settings: AttributeSettings) -> Method:
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
            f"--training replays a training, which these methods do: {able}. Drop it, or type --method {able}."
            if settings.training is not None
            else f"The method {settings.method} runs a training again. Type --training FOLDER, of `vestige train`."
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
            f"--tokens splits a gradient over tokens, and {settings.method} uses none. Drop --tokens, or type "
            "--method influence, grad-dot or grad-cos."
        )
    if settings.engine != "local" and not method.needs_gradients:
        raise SpecError(
            f"--engine {settings.engine} submits passes over gradients, and {settings.method} uses none: it scores in "
            "this process. Drop --engine and what belongs to it."
        )
    if settings.query_rank is not None and not method.needs_gradients:
        raise SpecError(
            f"--query-rank shortens the queries' gradients, and {settings.method} uses none. Drop --query-rank, or "
            "type --method grad-dot, grad-cos or ekfac."
        )
    if settings.self_influence:
        method.require_self_scores()


def _query_losses(job: Job, method: Method) -> list[float] | None:
    """Return the loss of every query, None without a model."""
    if job.loaded is None:
        return None
    if (known := method.measured_losses(job)) is not None:
        return known
    budget = indexes.batch_tokens(job.settings, job.loaded)
    return compute_losses(job.loaded.model, job.queries, job.settings.loss, budget).tolist()
