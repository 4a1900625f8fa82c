"""Work on SLURM: an array of workers, and a job after them that reads the markers and submits what is missing.

The markers show what is done, never the scheduler, which only shows whether a job still works. It all goes on when
the process that submitted it is gone.
"""

import os
import signal
import time
from collections.abc import Sequence
from typing import Any, NoReturn, TypeVar

from vestige.errors import PieceFailed, WorkElsewhere
from vestige.launch import _scheduler as scheduler
from vestige.launch._batch import submit_array, submit_reduce
from vestige.launch._command import require_command
from vestige.launch._failures import ranges
from vestige.launch._here import finish, missing_pieces, raise_failures
from vestige.launch._loop import Meter
from vestige.launch._record import JobFolder
from vestige.launch._role import Role
from vestige.launch._types import WorkPlan
from vestige.progress import announce, progress
from vestige.settings import LaunchSettings

Result = TypeVar("Result")

ATTEMPTS = 5
"""How often what is missing is submitted by itself. After that a person has to act."""
_POLL_SECONDS = 1.0
_QUEUE_SECONDS = 10.0
"""Between two requests to the scheduler, which many users share."""


def work_on_slurm(
    plan: WorkPlan[Any], settings: LaunchSettings, job: JobFolder, pieces: Sequence[int], command: list[str]
) -> None:
    """Do the pieces by batch jobs that this process waits for.

    Raises:
        WorkElsewhere: `settings.wait` is off; the jobs are submitted.
        PieceFailed: Pieces failed every time, or jobs ended without doing them.
    """
    alive = scheduler.waiting_or_running(_jobs(job))
    if alive:
        announce(f"{plan.name}: jobs of an earlier command are still there ({', '.join(alive)[:60]}).")
    else:
        submit_work(plan, settings, job, len(pieces), command, attempt=1)
    if not settings.wait:
        raise WorkElsewhere(
            f"{plan.name}: submitted as {', '.join(_jobs(job))}. See how far it is with `vestige status "
            f"{plan.folder}`, end it with `vestige cancel {plan.folder}`; logs are in {job.logs}."
        )
    try:
        _wait(plan, settings, job, pieces, command)
    except KeyboardInterrupt:
        announce(
            f"{plan.name}: the jobs go on. The same command waits for them again; "
            f"`vestige cancel {plan.folder}` ends them."
        )
        raise
    raise_failures(plan, job, pieces)


def submit_work(
    plan: WorkPlan[Any], settings: LaunchSettings, job: JobFolder, pieces: int, command: list[str], *, attempt: int
) -> None:
    """Queue an array of workers and the job after it, and note them in the job's record."""
    tasks = min(settings.workers, pieces)
    home = str(job.path.resolve())
    arrays = submit_array(settings, job, Role("worker", home, of=tasks, attempt=attempt), tasks, command)
    job.write_job(jobs=[*_jobs(job), *arrays], attempt=attempt)
    after = Role("reduce", home, attempt=attempt, waited_for=settings.wait)
    last = submit_reduce(settings, job, after, arrays, command)
    job.write_job(jobs=[*_jobs(job), last])
    announce(f"{plan.name}: {pieces} pieces submitted to {tasks} workers as SLURM job {', '.join(arrays)}.")


def reduce_job(
    plan: WorkPlan[Result], settings: LaunchSettings, job: JobFolder, role: Role, command: Sequence[str] | None
) -> Result:
    """Return the result, from within the job that comes after the array; or start the next attempt at what is missing.

    Raises:
        SystemExit: Others go on: the next jobs, or the process that waits for this one.
    """
    missing = missing_pieces(plan)
    worth_trying = [piece for piece in missing if not job.is_given_up(piece, settings.retries)]
    if worth_trying and role.attempt < ATTEMPTS and not job.read_job().get("cancelled"):
        print(f"{len(worth_trying)} pieces are missing: {ranges(worth_trying)}", flush=True)
        again = settings.model_copy(update={"wait": role.waited_for})
        submit_work(plan, again, job, len(worth_trying), require_command(command), attempt=role.attempt + 1)
        raise SystemExit(0)
    if role.waited_for:
        raise SystemExit(0)
    raise_failures(plan, job, range(plan.pieces))
    return finish(plan, settings, job)


def requeue_unless_cancelled(number: int, job: JobFolder, piece: int | None, *, progressed: bool) -> None:
    """Queue a stopped batch job again, unless the scheduler does that itself or a person ended it.

    SIGTERM comes from `scancel` and from preemption, where `--requeue` has the scheduler queue the job. The other two
    come before a time limit or a preemption that would end the job for good.
    """
    own = os.environ.get("SLURM_JOB_ID")
    if own is None or number == signal.SIGTERM or job.read_job().get("cancelled"):
        return
    if piece is not None and not progressed and number == signal.SIGUSR1:
        # A piece that is longer than the time limit would be begun for ever.
        job.record_failure(piece, "the job received a stop signal before it finished one piece; give a longer --time")
    scheduler.requeue(own)


def _wait(
    plan: WorkPlan[Any], settings: LaunchSettings, job: JobFolder, pieces: Sequence[int], command: list[str]
) -> None:
    left, asked = list(pieces), time.monotonic()
    with progress(round(sum(map(plan.weight, pieces))), plan.name, plan.unit) as bar:
        meter = Meter(bar.advance)
        while True:
            done = {piece for piece in left if plan.is_done(piece)}
            for piece in done:
                meter.piece(plan.weight(piece))
            left = [piece for piece in left if piece not in done]
            open_ones = [piece for piece in left if not job.is_given_up(piece, settings.retries)]
            if not open_ones or any(failure.fatal for failure in job.failures()):
                scheduler.cancel_jobs(_jobs(job))
                return
            if time.monotonic() - asked > _QUEUE_SECONDS:
                asked = time.monotonic()
                _require_workers(plan, settings, job, open_ones, command)
            time.sleep(_POLL_SECONDS)


def _require_workers(
    plan: WorkPlan[Any], settings: LaunchSettings, job: JobFolder, missing: list[int], command: list[str]
) -> None:
    """Make sure that jobs work on the missing pieces, or wait to: submit them again where none does."""
    jobs = _jobs(job)
    try:
        if scheduler.waiting_or_running(jobs) or _jobs(job) != jobs:
            return
    except scheduler.SchedulerSilent as error:
        announce(f"{plan.name}: {error}")
        return
    # Between the question about the markers and the one about the jobs, the last of them may have been done.
    if all(plan.is_done(piece) for piece in missing):
        return
    attempt, cancelled = job.read_job().get("attempt", 1), job.read_job().get("cancelled")
    if cancelled or attempt >= ATTEMPTS:
        _give_up(plan, job, missing, "was cancelled" if cancelled else f"was submitted {attempt} times")
    submit_work(plan, settings, job, len(missing), command, attempt=attempt + 1)


def _give_up(plan: WorkPlan[Any], job: JobFolder, missing: list[int], what: str) -> NoReturn:
    reasons = "".join(f"\n  {line}" for line in scheduler.why_ended(_jobs(job))[-5:])
    raise PieceFailed(
        f"{plan.name} {what}, and {len(missing)} of {plan.pieces} pieces are missing ({ranges(missing)}). Logs are in "
        f"{job.logs}.{reasons}\nRun the same command again: it computes only these."
    )


def _jobs(job: JobFolder) -> list[str]:
    return list(job.read_job().get("jobs", []))
