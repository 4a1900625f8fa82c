"""`vestige attribute`: from a question to the training examples behind its answer, as a run on disk."""

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from vestige.data import make_batch, plan_batches
from vestige.errors import SpecError
from vestige.folders import partial_folder, remove_partial
from vestige.gradients import CausalLoss, measure_knowledge
from vestige.indexes import batch_tokens
from vestige.launch import follow, is_follower, is_worker, profile, write_profile
from vestige.lockstep import FSDP, decided
from vestige.methods._explain import split_over_components, split_over_tokens
from vestige.methods._job import open_job
from vestige.methods._plan import self_scores, summarised
from vestige.methods._protocol import METHODS, Job, Method, get_method
from vestige.methods._randomised import QUERIES, ROWS, randomised_correlation, sampled_scores, without_weights
from vestige.methods._run_record import run_record
from vestige.methods._sweep import Swept, member_folder, sweep
from vestige.methods._trust import free_checks, knowledge_check, memorized_queries, memorized_reading
from vestige.models import batch_sharing
from vestige.progress import announce
from vestige.runs import (
    RECORD_FILE,
    Check,
    RunTables,
    Scores,
    ScoreSummary,
    TokenScores,
    check_target,
    sampled_rows,
    write_run,
)
from vestige.settings import AttributeSettings, verb


@verb(AttributeSettings)
def attribute(settings: AttributeSettings) -> Scores:
    """Rank the training examples behind an answer, with what the scores mean and how far to trust them.

    Raises:
        UserError: Something about the model, the data, the settings or the disk needs the caller.
    """
    started = time.perf_counter()
    # A worker never gets --overwrite: the process that a person started was, and writes the run.
    decided(lambda: check_target(settings.out, overwrite=settings.overwrite or is_worker() or is_follower()))
    method = _method(settings)
    if is_follower():
        follow(settings.out / RECORD_FILE, lambda: _help(settings, method))
        return Scores.open(settings.out)
    with profile(settings.profile) as measured, open_job(settings, method) as (job, generated):
        swept = sweep(job, _sweepable(method)) if settings.swept else None
        if swept is not None:
            job, method = swept.members[0].job, swept.members[0].method
        summary = swept.summaries[0] if swept is not None else summarised(job, method)
        own_scores = self_scores(job, method) if settings.self_influence else None
        losses = _query_losses(job)
        if losses is not None and (certain := memorized_queries(job.queries, losses, settings.loss)):
            announce(memorized_reading(certain, len(job.queries)))
        tables = _tables(job, method, summary, generated, losses)
        tables = tables._replace(self_scores=own_scores, tokens=_tokens(job, method, summary))
        checks = _trust(job, method, summary, losses) if settings.trust else []
        checks += [swept.check] if swept is not None else []
        record = run_record(settings, job, method, summary, checks, time.perf_counter() - started)
        others = _write_others(settings, swept, generated, losses, started) if swept is not None else []

    def add(run: Path) -> None:
        for folder in others:
            folder.rename(run / folder.name)
        write_profile(measured, run)

    def write() -> None:
        write_run(settings.out, record, tables, overwrite=settings.overwrite, add=add)
        remove_partial(settings.out)

    decided(write)
    return Scores.open(settings.out)


def _help(settings: AttributeSettings, method: Method) -> None:
    """Take part in everything that is done in pieces."""
    with open_job(settings, method) as (job, _):
        if settings.swept:
            swept = sweep(job, _sweepable(method))
            job, method = swept.members[0].job, swept.members[0].method
        else:
            summarised(job, method)
        if settings.self_influence:
            self_scores(job, method)


def _tables(
    job: Job, method: Method, summary: ScoreSummary, generated: list[bool], losses: list[float] | None
) -> RunTables:
    pairs = [(entry.query, entry.row) for entry in summary.ranked]
    return RunTables(
        train=job.train,
        queries=job.queries,
        ranked=summary.ranked,
        generated=generated,
        losses=losses,
        tokenizer=job.loaded.tokenizer if job.loaded is not None else None,
        components=split_over_components(job, method, pairs),
        dense=summary.dense,
    )


def _tokens(job: Job, method: Method, summary: ScoreSummary) -> list[TokenScores] | None:
    if not job.settings.tokens:
        return None
    return split_over_tokens(job, method, [(entry.query, entry.row) for entry in summary.ranked])


def _write_others(
    settings: AttributeSettings, swept: Swept, generated: list[bool], losses: list[float] | None, started: float
) -> list[Path]:
    """Write the runs of a sweep but the main one, beside it until that is written; each records how to make it alone.

    Of the free checks they have those that need no model; tokens and self-influence are the main run's alone.
    """
    written = []
    for member, summary in zip(swept.members[1:], swept.summaries[1:], strict=True):
        place = member_folder(partial_folder(settings.out), member.damping)
        own = {"damping": member.damping, "out": settings.out / place.name, "tokens": False, "self_influence": False}
        checks = free_checks(member.job, member.method, summary.ranked, losses=losses) if settings.trust else []
        tables = _tables(member.job, member.method, summary, generated, losses)
        seconds = time.perf_counter() - started
        record = run_record(settings.model_copy(update=own), member.job, member.method, summary, checks, seconds)
        written.append(decided(partial(write_run, place, record, tables, overwrite=True)))
    return written


def _sweepable(method: Method) -> Method:
    """Return the method, if its measurements serve any damping.

    Raises:
        SpecError: it does not.
    """
    if method.sweeps_damping:
        return method
    able = [each.name for each in METHODS if each.sweeps_damping]
    raise SpecError(
        f"Several dampings were given, and {method.name} cannot score them in one pass: it has no damping, or needs "
        f"new measurements for each. Give one --damping, or type --method with one of: {', '.join(able)}."
    )


def _method(settings: AttributeSettings) -> Method:
    """Return the method; refuse everything it cannot do before any work."""
    method = get_method(settings.method, **settings.options)
    if settings.device == FSDP and (not method.works_sharded or settings.tokens):
        able = ", ".join(each.name for each in METHODS if each.works_sharded)
        what = "--tokens" if settings.tokens else f"--method {settings.method}"
        raise SpecError(
            f"{what} differentiates the model in a way that FSDP2 does not know. With --device {FSDP} there are: "
            f"{able}, without --tokens. Or spread the layers over the GPUs of one process: "
            "--device balanced."
        )
    if settings.swept:
        _sweepable(method)
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
    if settings.self_influence and not method.scores_itself:
        raise SpecError(
            f"Self-influence is defined for gradient methods, and {settings.method} is none. Type --method influence."
        )
    without_model = settings.index is None and settings.model is None and settings.checkpoints is None
    if method.needs_model and without_model:
        raise SpecError(f"The method {settings.method} runs the model. Type --model MODEL, or --index FOLDER.")
    return method


def _query_losses(job: Job) -> list[float] | None:
    """Return the loss of every query, None without a model."""
    if job.loaded is None:
        return None
    losses = np.zeros(len(job.queries))
    objective, device = CausalLoss(job.settings.loss), next(job.loaded.model.parameters()).device
    with torch.no_grad():
        budget, sharing = batch_tokens(job.settings, job.loaded), batch_sharing(job.loaded.model)
        for rows in plan_batches(job.queries.lengths, budget, sharing=sharing):
            batch = make_batch(job.queries, rows).to(device)
            losses[rows] = objective.losses(job.loaded.model, batch).float().cpu().numpy()
    return losses.tolist()


def _trust(job: Job, method: Method, summary: ScoreSummary, losses: Sequence[float] | None) -> list[Check]:
    checks = free_checks(job, method, summary.ranked, losses=losses)
    if job.loaded is None or not method.needs_model:
        return [without_weights(), *checks]

    model, rows = job.loaded.model, np.setdiff1d(sampled_rows(len(job.train), ROWS), job.skipped)
    score = partial(sampled_scores, job, rows, np.arange(min(len(job.queries), QUERIES)))
    known = measure_knowledge(model, job.train.subset(rows), batch_tokens(job.settings, job.loaded))
    correlation = randomised_correlation(model, score, len(rows), knowledge=known, seed=job.settings.seed)
    return [correlation, *([] if known is None else [knowledge_check(known)]), *checks]
