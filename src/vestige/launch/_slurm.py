"""Work on SLURM: an array of workers, and a job after them that reads the markers and submits what is missing.

The markers show what is done, never the scheduler, which only shows whether a job still works. It all goes on when
the process that submitted it is gone.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from vestige.errors import PieceFailed, UserError, WorkElsewhere
from vestige.launch._local import require_command, worker_environment
from vestige.launch._pieces import Result, WorkPlan
from vestige.launch._record import JobFolder, ranges
from vestige.launch._role import Role
from vestige.launch._work import Meter, finish, missing_pieces, raise_failures
from vestige.progress import announce, progress
from vestige.settings import LaunchSettings
from vestige.storage import make_folder, write_durably

TIMEOUT_SECONDS = 30.0
_DEFAULT_ARRAY_SIZE = 1001
_OVER = ("CANCELLED", "COMPLETED", "FAILED", "TIMEOUT", "BOOT_FAIL", "DEADLINE", "NODE_FAIL", "OUT_OF_MEMORY")


class SchedulerSilent(UserError):
    """The scheduler did not answer, or not in time."""


def submit_script(options: Sequence[str], script: str) -> str:
    """Submit a new batch job and return its id.

    Raises:
        UserError: SLURM refused it; the message is its own.
    """
    return _call("sbatch", "--parsable", *options, script).strip().split(";")[0]


def waiting_or_running(jobs: Sequence[str]) -> dict[str, str]:
    """Return the state of each task of these jobs that is not over, by its id.

    Raises:
        SchedulerSilent: The scheduler did not answer: nothing is known.
    """
    if not jobs:
        return {}
    try:
        listed = _call("squeue", "--noheader", "--array", "--format=%i %T", "--jobs=" + ",".join(jobs))
    except SchedulerSilent:
        raise
    except UserError as error:
        # Jobs that ended some minutes ago are forgotten.
        if "Invalid job id" in str(error):
            return {} if len(jobs) == 1 else _each(jobs)
        raise
    states = dict(line.split(maxsplit=1) for line in listed.splitlines() if " " in line.strip())
    return {job: state for job, state in states.items() if state not in _OVER}


def _each(jobs: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for job in jobs:
        found |= waiting_or_running([job])
    return found


def cancel_batch_jobs(jobs: Sequence[str]) -> None:
    """Cancel the jobs; those that are over are no error."""
    if jobs:
        _call("scancel", "--", *jobs, refused=False)


def requeue(job: str) -> None:
    """Queue the job again, as far as SLURM allows it."""
    _call("scontrol", "requeue", job, refused=False)


def largest_array() -> int:
    """Return the number of tasks that an array may have here."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", _call("scontrol", "show", "config"), re.MULTILINE)
    # The setting is one more than the largest number of a task.
    return max(int(found[1]) if found else _DEFAULT_ARRAY_SIZE, 1)


def why_ended(jobs: Sequence[str]) -> list[str]:
    """Return one line for each task that did not end well, as far as the site keeps accounts; none otherwise."""
    if not jobs or shutil.which("sacct") is None:
        return []
    words = ("--noheader", "--parsable2", "--allocations", "--format=JobID,State,ExitCode", "--jobs=" + ",".join(jobs))
    try:
        listed = _call("sacct", *words)
    except UserError:
        return []
    rows = [line.split("|") for line in listed.splitlines() if line.count("|") == 2]
    return [f"job {job}: {state}, exit {code}" for job, state, code in rows if state not in ("COMPLETED", "RUNNING")]


def seconds_of(limit: str) -> int | None:
    """Return the seconds of a time limit as sbatch takes it; None if it is none.

    The formats are minutes, m:s, h:m:s, d-h, d-h:m and d-h:m:s.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit.strip())
    if match is None:
        return None
    days, first, second, third = (None if part is None else int(part) for part in match.groups())
    if days is not None:
        return 86400 * days + 3600 * (first or 0) + 60 * (second or 0) + (third or 0)
    if third is not None:
        return 3600 * (first or 0) + 60 * (second or 0) + third
    return 60 * (first or 0) + (second or 0)


def _call(program: str, *words: str, refused: bool = True) -> str:
    """Run the program and return its output; with `refused` False its refusal is no error."""
    try:
        run = subprocess.run([program, *words], capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    except FileNotFoundError:
        raise UserError(
            f"SLURM's {program} is not on this machine's PATH. Type the command on a login node of the cluster, or "
            "use --workers N here, or --shard i/n under another scheduler."
        ) from None
    except subprocess.TimeoutExpired:
        raise SchedulerSilent(
            f"SLURM's {program} did not answer within {TIMEOUT_SECONDS:.0f} s. When the scheduler is back, run the "
            "same command again: finished pieces are kept."
        ) from None
    if run.returncode and refused:
        if "ontact" in run.stderr and "controller" in run.stderr:
            raise SchedulerSilent(f"SLURM's {program} reached no controller: {run.stderr.strip()}")
        raise UserError(f"SLURM's {program} refused: {run.stderr.strip() or run.stdout.strip()}")
    return run.stdout


_LEAD_SECONDS = (10, 120)
"""Shortest and longest warning before the time limit; a fifth of the limit between them."""


def submit_array(settings: LaunchSettings, job: JobFolder, role: Role, tasks: int, command: Sequence[str]) -> list[str]:
    """Submit arrays whose tasks run `command` as workers, several where one may not be so large; return their ids."""
    largest = largest_array()
    script = _script(settings, job, role, "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}", command)
    ids = []
    for first in range(0, tasks, largest):
        last = min(first + largest, tasks) - first - 1
        log = f"--output={job.logs}/%A_%a.log"
        ids.append(submit_script([*_options(settings, job), log, f"--array=0-{last}"], str(script)))
    return ids


def submit_reduce(
    settings: LaunchSettings, job: JobFolder, role: Role, after: Sequence[str], command: Sequence[str]
) -> str:
    """Submit the job that continues from what the arrays left, in whatever state they ended; return its id."""
    script = _script(settings, job, role, "${SLURM_JOB_ID}", command)
    dependency = "--dependency=afterany:" + ":".join(after)
    return submit_script([*_options(settings, job), f"--output={job.logs}/%j-reduce.log", dependency], str(script))


def _options(settings: LaunchSettings, job: JobFolder) -> list[str]:
    given = {name: getattr(settings, name) for name in ("partition", "account", "gres", "time", "mem")}
    limit = seconds_of(settings.time) if settings.time else None
    shortest, longest = _LEAD_SECONDS
    lead = longest if limit is None else min(max(limit // 5, shortest), longest)
    return [
        f"--job-name=vestige-{job.path.name}",
        f"--cpus-per-task={settings.threads}",
        f"--chdir={Path.cwd()}",
        # The signal goes to the script alone, which has become the worker.
        f"--signal=B:USR1@{lead}",
        "--requeue",
        "--open-mode=append",
        *(f"--{name}={value}" for name, value in given.items() if value is not None),
    ]


def _script(settings: LaunchSettings, job: JobFolder, role: Role, log: str, command: Sequence[str]) -> Path:
    """Write the script and return its path.

    `exec` lets signals arrive at the worker: a shell would wait for its child to end first.
    """
    environment = worker_environment(settings, job.logs) | role.as_environment()
    lines = ["#!/bin/bash", "set -e"]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in environment.items() if name != "VESTIGE_LOG"]
    lines.append(f'export VESTIGE_LOG={shlex.quote(str(job.logs))}/"{log}.log"')
    if settings.setup:
        lines.append(settings.setup)
    words = [*_container(settings), "python", *command[1:]] if settings.container else command
    lines.append("exec " + shlex.join(words))
    make_folder(job.path / "slurm")
    path = job.path / "slurm" / f"{role.kind}-{role.attempt}.sh"
    write_durably(path, [("\n".join(lines) + "\n").encode()])
    return path.resolve()


def _container(settings: LaunchSettings) -> list[str]:
    """Return the words before the command: an Apptainer image with this folder in it, and the GPUs if any."""
    folder = os.getcwd()
    cards = ["--nv"] if settings.gres is not None else []
    return ["apptainer", "exec", *cards, "--bind", folder, "--pwd", folder, str(settings.container)]


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
    alive = waiting_or_running(_jobs(job))
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
    requeue(own)


def _wait(
    plan: WorkPlan[Any], settings: LaunchSettings, job: JobFolder, pieces: Sequence[int], command: list[str]
) -> None:
    left, checked = list(pieces), time.monotonic()
    with progress(round(sum(map(plan.weight, pieces))), plan.name, plan.unit) as bar:
        meter = Meter(bar.advance)
        while True:
            done = {piece for piece in left if plan.is_done(piece)}
            for piece in done:
                meter.piece(plan.weight(piece))
            left = [piece for piece in left if piece not in done]
            open_ones = [piece for piece in left if not job.is_given_up(piece, settings.retries)]
            if not open_ones or any(failure.fatal for failure in job.failures()):
                cancel_batch_jobs(_jobs(job))
                return
            if time.monotonic() - checked > _QUEUE_SECONDS:
                checked = time.monotonic()
                _require_workers(plan, settings, job, open_ones, command)
            time.sleep(_POLL_SECONDS)


def _require_workers(
    plan: WorkPlan[Any], settings: LaunchSettings, job: JobFolder, missing: list[int], command: list[str]
) -> None:
    """Make sure that jobs work on the missing pieces, or wait to: submit them again where none does."""
    jobs = _jobs(job)
    try:
        if waiting_or_running(jobs) or _jobs(job) != jobs:
            return
    except SchedulerSilent as error:
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
    reasons = "".join(f"\n  {line}" for line in why_ended(_jobs(job))[-5:])
    raise PieceFailed(
        f"{plan.name} {what}, and {len(missing)} of {plan.pieces} pieces are missing ({ranges(missing)}). Logs are in "
        f"{job.logs}.{reasons}\nRun the same command again: it computes only these."
    )


def _jobs(job: JobFolder) -> list[str]:
    return list(job.read_job().get("jobs", []))
