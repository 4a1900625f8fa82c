"""The engine of a SLURM cluster: an array of workers, and a job after them that submits what is missing.

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
from dataclasses import replace
from pathlib import Path
from typing import NoReturn, final

from vestige.errors import PieceFailed, SpecError, UserError, WorkElsewhere
from vestige.jobs._command import require_command, worker_environment
from vestige.jobs._engine import Engine, Work, Worker, raise_failures, watch_markers
from vestige.jobs._record import JobFolder, ranges
from vestige.jobs._role import Role
from vestige.jobs._steps import is_kept, stop_signal
from vestige.progress import announce
from vestige.storage import make_folder, write_durably

ATTEMPTS = 5
"""How often what is missing is submitted by itself. After that a person has to act."""
_POLL_SECONDS = 1.0
_QUEUE_VARIABLE, _QUEUE_SECONDS = "VESTIGE_QUEUE_SECONDS", "10"
"""Between two requests to the scheduler, which many users share."""


@final
class SlurmEngine(Engine):
    """Workers are the tasks of an array, each with every n-th of the pieces that were missing when it was submitted."""

    def submit(self, work: Work) -> None:
        """Submit an array and the job after it, unless those of an earlier command are still there."""
        alive = waiting_or_running(_jobs(work.job))
        if alive:
            announce(f"{work.pieces.name}: jobs of an earlier command are still there ({', '.join(alive)[:60]}).")
        else:
            _submit(work, attempt=1)

    def wait(self, work: Work, submitted: None) -> None:  # noqa: ARG002
        """Wait for the jobs, and submit again what they left undone."""
        pieces, job = work.pieces, work.job
        if not work.settings.wait:
            raise WorkElsewhere(
                f"{pieces.name}: submitted as {', '.join(_jobs(job))}. See how far it is with `vestige status "
                f"{pieces.folder}`, end it with `vestige cancel {pieces.folder}`; logs are in {job.logs}."
            )
        checked, pause = time.monotonic(), _queue_seconds()

        def require_workers() -> bool:
            nonlocal checked
            if time.monotonic() - checked > pause:
                checked = time.monotonic()
                _require_workers(replace(work, missing=[piece for piece in work.missing if not work.is_over(piece)]))
            return True

        try:
            watch_markers(work, require_workers, _POLL_SECONDS)
            _cancel_batch_jobs(_jobs(job))
        except KeyboardInterrupt:
            announce(
                f"{pieces.name}: the jobs go on. The same command waits for them again; "
                f"`vestige cancel {pieces.folder}` ends them."
            )
            raise

    def restart(self, job: JobFolder, worker: Worker) -> None:
        """Queue a stopped batch job again, unless the scheduler does that itself or a person ended it.

        SIGTERM comes from `scancel` and from preemption, where `--requeue` has the scheduler queue the job. The other
        two come before a time limit or a preemption that would end the job for good.
        """
        own, number = os.environ.get("SLURM_JOB_ID"), stop_signal()
        if own is None or number == signal.SIGTERM or job.read_job().get("cancelled"):
            return
        if worker.stopped_in is not None and number == signal.SIGUSR1 and not (worker.computed or is_kept()):
            # A piece that is longer than the time limit would be begun for ever.
            message = "the job received a stop signal before it finished one piece; give a longer --time"
            job.record_failure(worker.stopped_in, message)
        _call("scontrol", "requeue", own, refused=False)

    def follow_up(self, work: Work, role: Role) -> None:
        """Submit the next attempt, from within the job that comes after the array; else leave the end to the driver."""
        _count_deaths(work, role.attempt)
        worth_trying = [piece for piece in work.missing if not work.is_over(piece)]
        if worth_trying and role.attempt < ATTEMPTS and not work.job.read_job().get("cancelled"):
            print(f"{len(worth_trying)} pieces are missing: {ranges(worth_trying)}", flush=True)
            settings = work.settings.model_copy(update={"wait": role.waited_for})
            command = require_command(work.command or None)
            _submit(replace(work, missing=worth_trying, settings=settings, command=command), attempt=role.attempt + 1)
            raise SystemExit(0)
        if role.waited_for:
            raise SystemExit(0)
        raise_failures(work)

    def cancel(self, job: JobFolder) -> list[str]:
        """Cancel the batch jobs."""
        record = job.read_job()
        if not (jobs := record.get("jobs")):
            return []
        _cancel_batch_jobs(jobs)
        return [f"{record['name']}: SLURM jobs {' '.join(jobs)} are cancelled."]

    def status(self, job: JobFolder) -> bool:
        """Return whether a batch job waits or runs."""
        return bool(waiting_or_running(_jobs(job)))


SLURM = SlurmEngine()


def _submit(work: Work, *, attempt: int) -> None:
    """Queue an array of workers and the job after it, and note them in the job's record."""
    job, wanted = work.job, len(work.missing)
    tasks, home = min(work.settings.workers, wanted), str(job.path.resolve())
    # Those that failed come last: what ends a worker shall not keep the others from being done.
    ordered = sorted(work.missing, key=lambda piece: (job.failure(piece) is not None, piece))
    shares = replace(work, missing=ordered).write_shares(_shares_path(job, attempt))
    make_folder(job.path / "slurm")
    arrays = _submit_arrays(work, Role("worker", home, of=tasks, in_array=True, shares=shares, attempt=attempt), tasks)
    job.write_job(jobs=[*_jobs(job), *arrays], attempt=attempt)
    after = Role("reduce", home, attempt=attempt, waited_for=work.settings.wait)
    job.write_job(jobs=[*_jobs(job), _submit_reduce(work, after, arrays)])
    announce(f"{work.pieces.name}: {wanted} pieces submitted to {tasks} workers as SLURM job {', '.join(arrays)}.")


def _require_workers(work: Work) -> None:
    """Make sure that jobs work on the missing pieces, or wait to: submit them again where none does."""
    jobs = _jobs(work.job)
    try:
        if waiting_or_running(jobs) or _jobs(work.job) != jobs:
            return
    except SchedulerSilent as error:
        announce(f"{work.pieces.name}: {error}")
        return
    # Between the question about the markers and the one about the jobs, the last of them may have been done.
    if all(map(work.pieces.is_done, work.missing)):
        return
    record = work.job.read_job()
    attempt, cancelled = record.get("attempt", 1), record.get("cancelled")
    if cancelled or attempt >= ATTEMPTS:
        _give_up(work, "was cancelled" if cancelled else f"was submitted {attempt} times")
    _count_deaths(work, attempt)
    left = [piece for piece in work.missing if not work.is_over(piece)]
    if left:
        _submit(replace(work, missing=left), attempt=attempt + 1)


def _count_deaths(work: Work, attempt: int) -> None:
    """Count the deaths of workers, all of which are over, against the pieces that they had begun in this attempt."""
    job, missing = work.job, set(work.missing)
    submitted = _shares_path(job, attempt).stat().st_mtime
    for journal in job.journals():
        if journal.worker and journal.at_work in missing and journal.written > submitted:
            job.record_failure(journal.at_work, "its worker died", log=f"{job.logs}/{journal.worker.job}.log")


def _shares_path(job: JobFolder, attempt: int) -> Path:
    return job.path / "shares" / f"slurm-{attempt}.json"


def _give_up(work: Work, what: str) -> NoReturn:
    reasons = "".join(f"\n  {line}" for line in why_ended(_jobs(work.job))[-5:])
    raise PieceFailed(
        f"{work.pieces.name} {what}, and {len(work.missing)} of {work.pieces.count} pieces are missing "
        f"({ranges(work.missing)}). Logs are in {work.job.logs}.{reasons}\n"
        "Run the same command again: it computes only these."
    )


def _queue_seconds() -> float:
    given = os.environ.get(_QUEUE_VARIABLE, _QUEUE_SECONDS)
    if re.fullmatch(r"\d+(\.\d+)?", given) is None:
        raise SpecError(f"{_QUEUE_VARIABLE} was {given!r}, expected a number of seconds, such as {_QUEUE_SECONDS}.")
    return float(given)


def _jobs(job: JobFolder) -> list[str]:
    return list(job.read_job().get("jobs", []))


_LEAD_SECONDS = (10, 120)
"""Shortest and longest warning before the time limit; a fifth of the limit between them."""


def _submit_arrays(work: Work, role: Role, tasks: int) -> list[str]:
    """Submit arrays whose tasks run the command as workers, several where one may not be so large; return their ids."""
    largest = largest_array()
    ids = []
    for first in range(0, tasks, largest):
        last = min(first + largest, tasks) - first - 1
        script = _script(work, role._replace(number=first), "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}")
        log = f"--output={work.job.logs}/%A_%a.log"
        ids.append(submit_script([*_options(work), log, f"--array=0-{last}"], str(script)))
    return ids


def _submit_reduce(work: Work, role: Role, after: Sequence[str]) -> str:
    """Submit the job that continues from what the arrays left, in whatever state they ended; return its id."""
    script = _script(work, role, "${SLURM_JOB_ID}")
    dependency = "--dependency=afterany:" + ":".join(after)
    return submit_script([*_options(work), f"--output={work.job.logs}/%j-reduce.log", dependency], str(script))


def _options(work: Work) -> list[str]:
    settings = work.settings
    given = {name: getattr(settings, name) for name in ("partition", "account", "gres", "time", "mem")}
    limit = seconds_of(settings.time) if settings.time else None
    shortest, longest = _LEAD_SECONDS
    lead = longest if limit is None else min(max(limit // 5, shortest), longest)
    return [
        f"--job-name=vestige-{work.job.path.name}",
        f"--cpus-per-task={settings.threads}",
        f"--chdir={Path.cwd()}",
        # The signal goes to the script alone, which has become the worker.
        f"--signal=B:USR1@{lead}",
        "--requeue",
        "--open-mode=append",
        *(f"--{name}={value}" for name, value in given.items() if value is not None),
    ]


def _script(work: Work, role: Role, log: str) -> Path:
    """Write the script and return its path.

    `exec` lets signals arrive at the worker: a shell would wait for its child to end first.
    """
    settings, job, command = work.settings, work.job, work.command
    environment = worker_environment(settings, job.logs) | role.as_environment()
    lines = ["#!/bin/bash", "set -e"]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in environment.items() if name != "VESTIGE_LOG"]
    lines.append(f'export VESTIGE_LOG={shlex.quote(str(job.logs))}/"{log}.log"')
    if settings.setup:
        lines.append(settings.setup)
    words = [*_container(work), "python", *command[1:]] if settings.container else command
    lines.append("exec " + shlex.join(words))
    path = job.path / "slurm" / f"{role.kind}-{role.attempt}{f'-{role.number}' if role.number else ''}.sh"
    write_durably(path, [("\n".join(lines) + "\n").encode()])
    return path.resolve()


def _container(work: Work) -> list[str]:
    """Return the words before the command: an Apptainer image with this folder in it, and the GPUs if any."""
    folder = os.getcwd()
    cards = ["--nv"] if work.settings.gres is not None else []
    return ["apptainer", "exec", *cards, "--bind", folder, "--pwd", folder, str(work.settings.container)]


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


def _cancel_batch_jobs(jobs: Sequence[str]) -> None:
    """Cancel the jobs; those that are over are no error."""
    if jobs:
        _call("scancel", "--", *jobs, refused=False)


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
