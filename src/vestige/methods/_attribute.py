"""`vestige attribute`: from a question to the training examples behind its answer, as a run on disk."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from vestige.distributed import broadcast_from_rank0, is_rank0
from vestige.jobs import PROFILE_FILE, follow, is_follower, profile, write_profile
from vestige.methods import Job, Live, Method, OnAnswer, OnAnswers, open_job
from vestige.methods._plan import Member, compute_self_scores, summarise
from vestige.methods._record import (
    StoredRun,
    begin_run,
    digest_inputs,
    find_begun,
    find_method,
    is_plain_worker,
    make_record,
    make_tables,
    measure_query_losses,
    split_over_components,
    take_up,
)
from vestige.methods._trust import describe_memorized, find_memorized, run_free_checks
from vestige.progress import announce
from vestige.runs import RECORD_FILE, Check, RunRecord, Scores, add_part, is_complete, write_run
from vestige.settings import AttributeSettings, with_settings
from vestige.storage import partial_folder, remove_partial, sha256_of

_POLL_SECONDS = 0.2


@with_settings(AttributeSettings)
def attribute(
    settings: AttributeSettings,
    on_answers: OnAnswers | None = None,
    on_ranking: Callable[[Scores], None] | None = None,
    live: Live | None = None,
    on_answer: OnAnswer | None = None,
) -> Scores:
    """Rank the training examples behind an answer, with what the scores mean and how far to trust them.

    The run is on disk once the ranking is known; scores of components and tokens, self-influence and the trust checks
    are added to it one after another. Stopped in between, it says what it lacks, and the same call adds that.

    Args:
        settings: What to do.
        on_answers: Called with the queries, and whether each answer is the model's own, once they have answers.
        on_ranking: Called with the run once it is on disk with its ranking.
        live: A model that stays in memory between questions, and what is called while it answers.
        on_answer: Called with the queries as far as they have answers, and the number of one, as soon as the model's
            answer to it has ended: short answers first.

    Raises:
        UserError: Something about the model, the data, the settings or the disk needs the caller.
    """
    if settings.rerank is not None:
        from vestige.methods._ladder import climb  # other runs do without

        return climb(settings, partial(vars(attribute)["run"], on_answer=on_answer), on_answers, on_ranking)
    started = time.perf_counter()
    begun = broadcast_from_rank0(lambda: find_begun(settings))
    method = find_method(settings)
    if is_follower():
        follow(settings.out / RECORD_FILE, lambda: _score_elsewhere(settings, method))
        while not is_complete(settings.out):
            time.sleep(_POLL_SECONDS)
        return Scores.open(settings.out)
    if is_plain_worker():
        # It ends in the job that it is for; met that nowhere, it is done already.
        _score_elsewhere(settings, method)
        raise SystemExit(0)
    with profile(settings.profile) as measured, open_job(settings, method, on_answers, live, on_answer) as job:
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


def _begin(settings: AttributeSettings, job: Job, method: Method, started: float) -> StoredRun:
    """Rank the training examples, and write the run without the parts that are added to it."""
    members, checks = _score(job, method)
    main = members[0]
    losses = measure_query_losses(main.job, main.method)
    if losses is not None and (certain := find_memorized(job.queries, losses, settings.loss)):
        announce(describe_memorized(certain, len(job.queries)))
    others = [_write_beside(settings, member, losses, started) for member in members[1:]]

    def move_others(run: Path) -> None:
        for folder in others:
            folder.rename(run / folder.name)

    return begin_run(settings, main, losses, started, move_others, checks=checks, inputs=digest_inputs(job))


def _take_up(job: Job, method: Method, begun: RunRecord, started: float) -> StoredRun:
    run = take_up(job, method, begun, started)
    if job.settings.swept:
        # Which of the dampings the run is at depends on those at which the curvature could be inverted.
        run.job, run.method, _ = _score(job, method)[0][0]
    return run


def _score(job: Job, method: Method) -> tuple[list[Member], list[Check]]:
    """Return the scores, at each damping, the run's own first; and the check that compares the dampings."""
    if job.settings.swept:
        from vestige.methods._sweep import sweep

        members, check = sweep(job, method)
        return members, [check]
    return [Member(job, method, summarise(job, method)[0])], []


def _score_elsewhere(settings: AttributeSettings, method: Method) -> None:
    """Compute pieces for the process that writes the run: everything that is done in pieces."""
    with open_job(settings, method) as job:
        main = _score(job, method)[0][0]
        if settings.self_influence:
            compute_self_scores(main.job, main.method)


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
    tables = make_tables(job, summary.ranked, losses)._replace(
        components=split_over_components(job, method, pairs), dense=summary.dense
    )
    record = make_record(settings.model_copy(update=own), member, time.perf_counter() - started, checks)
    return broadcast_from_rank0(partial(write_run, partial_folder(settings.out) / name, record, tables, overwrite=True))
