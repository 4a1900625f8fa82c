"""The engine of a SLURM cluster: an array of workers, and a job after them that submits what is missing.

The markers show what is done, never the scheduler, which only shows whether a job still works. It all goes on when
the process that submitted it is gone.
"""

import os
import re
import shlex
import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import final

from vestige.errors import PieceFailed, SpecError, UserError, WorkElsewhere
from vestige.jobs._engine import Engine, Work, Worker, raise_failures, watch_markers
from vestige.jobs._record import JobFolder, ranges
from vestige.jobs._steps import is_kept, stop_signal
from vestige.jobs._worker import Role, require_command, worker_environment
from vestige.progress import announce
from vestige.storage import make_folder, write_durably

_ATTEMPTS = 5
"""How often what is missing is submitted by itself. After that a person has to act."""
_QUEUE_VARIABLE, _QUEUE_SECONDS = "VESTIGE_QUEUE_SECONDS", "10"
"""Between two requests to the scheduler, which many users share."""
_TIMEOUT_SECONDS = 30.0
_LEAD_SECONDS = (10, 120)
"""Shortest and longest warning before the time limit; a fifth of the limit between them."""
_OVER = ("CANCELLED", "COMPLETED", "FAILED", "TIMEOUT", "BOOT_FAIL", "DEADLINE", "NODE_FAIL", "OUT_OF_MEMORY")


class SchedulerSilent(UserError):
    """The scheduler did not answer, or not in time."""


@final
class SlurmEngine(Engine):
    """Workers are the tasks of an array, each with every n-th of the pieces that were missing when it was submitted."""

    def submit(self, work: Work) -> None:
        """Submit an array and the job after it, unless those of an earlier command are still there."""
        if active := _active(work.job):
            announce(f"{work.pieces.name}: jobs of an earlier command are still there ({', '.join(active)[:60]}).")
        else:
            _submit(work, attempt=1)

    def wait(self, work: Work, submitted: None) -> None:  # noqa: ARG002
        """Wait until every piece is done or given up; the job after the array submits what is missing."""
        name, job, folder = work.pieces.name, work.job, work.pieces.folder
        if not work.settings.wait:
            raise WorkElsewhere(
                f"{name}: submitted as {', '.join(_jobs(job))}. See how far it is with `vestige status {folder}`, end "
                f"it with `vestige cancel {folder}`; logs are in {job.logs}."
            )
        try:
            watch_markers(work, lambda: _require_jobs(work), _queue_seconds())
            self.cancel(job)
        except KeyboardInterrupt:
            announce(
                f"{name}: the jobs go on. The same command waits for them again; `vestige cancel {folder}` ends them."
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
        if worth_trying and role.attempt < _ATTEMPTS and not work.job.read_job().get("cancelled"):
            print(f"{len(worth_trying)} pieces are missing: {ranges(worth_trying)}", flush=True)
            settings = work.settings.model_copy(update={"wait": role.waited_for})
            command = require_command(work.command or None)
            _submit(replace(work, missing=worth_trying, settings=settings, command=command), attempt=role.attempt + 1)
            raise SystemExit(0)
        if role.waited_for:
            raise SystemExit(0)
        raise_failures(work)

    def cancel(self, job: JobFolder) -> list[str]:
        """Cancel the batch jobs; those that are over are no error."""
        record = job.read_job()
        if not (jobs := record.get("jobs")):
            return []
        _call("scancel", "--", *jobs, refused=False)
        return [f"{record['name']}: SLURM jobs {' '.join(jobs)} are cancelled."]

    def status(self, job: JobFolder) -> bool:
        """Return whether a batch job waits or runs."""
        return bool(_active(job))


SLURM = SlurmEngine()


def _jobs(job: JobFolder) -> list[str]:
    return list(job.read_job().get("jobs", []))


def _active(job: JobFolder) -> list[str]:
    """Return the batch jobs, tasks of arrays one by one, that wait or run; raise where the scheduler is silent."""
    jobs = set(_jobs(job))
    if not jobs:
        return []
    # All of this user: the scheduler refuses a question about a job that ended some minutes ago.
    listed = [line.split() for line in _call("squeue", "--me", "--noheader", "--array", "--format=%i %T").splitlines()]
    return [line[0] for line in listed if len(line) == 2 and line[0].split("_")[0] in jobs and line[1] not in _OVER]


def _require_jobs(work: Work) -> bool:
    """Return True, unless no batch job works on the missing pieces, or waits to, and the scheduler answers: raise."""
    job, jobs = work.job, _jobs(work.job)
    try:
        if _active(job) or _jobs(job) != jobs:
            return True
    except SchedulerSilent as error:
        announce(f"{work.pieces.name}: {error}")
        return True
    # Before the question about the jobs, the last of the pieces may not have been done.
    missing = [piece for piece in work.missing if not work.is_over(piece)]
    if not missing:
        return True
    record = job.read_job()
    what = "was cancelled" if record.get("cancelled") else f"was submitted {record.get('attempt', 1)} times"
    raise PieceFailed(
        f"{work.pieces.name} {what}, and {len(missing)} of {work.pieces.count} pieces are missing "
        f"({ranges(missing)}). Logs are in {job.logs}.{_why_ended(jobs)}\n"
        "Run the same command again: it computes only these."
    )


def _count_deaths(work: Work, attempt: int) -> None:
    """Count the deaths of workers, all of which are over, against the pieces that they had begun in this attempt."""
    job, missing = work.job, set(work.missing)
    submitted = _shares_path(job, attempt).stat().st_mtime
    for journal in job.journals():
        if journal.worker and journal.at_work in missing and journal.written > submitted:
            job.record_failure(journal.at_work, "its worker died", log=f"{job.logs}/{journal.worker.job}.log")


def _shares_path(job: JobFolder, attempt: int) -> Path:
    return job.path / "shares" / f"slurm-{attempt}.json"


def _queue_seconds() -> float:
    given = os.environ.get(_QUEUE_VARIABLE, _QUEUE_SECONDS)
    if re.fullmatch(r"\d+(\.\d+)?", given) is None:
        raise SpecError(f"{_QUEUE_VARIABLE} was {given!r}, expected a number of seconds, such as {_QUEUE_SECONDS}.")
    return float(given)


def _submit(work: Work, *, attempt: int) -> None:
    """Queue an array of workers, several where one may not be so large, and the job after them; note their ids."""
    job, tasks, home = work.job, min(work.settings.workers, len(work.missing)), str(work.job.path.resolve())
    # Those that failed come last: what ends a worker shall not keep the others from being done.
    ordered = sorted(work.missing, key=lambda piece: (job.failure(piece) is not None, piece))
    shares = replace(work, missing=ordered).write_shares(_shares_path(job, attempt))
    worker = Role("worker", home, of=tasks, in_array=True, shares=shares, attempt=attempt)
    largest, arrays = _largest_array(), list[str]()
    for first in range(0, tasks, largest):
        last = min(first + largest, tasks) - first - 1
        arrays.append(_submit_script(work, worker._replace(number=first), f"--array=0-{last}"))
    job.write_job(jobs=[*_jobs(job), *arrays], attempt=attempt)
    # It has to run in whatever state the arrays ended.
    after = Role("reduce", home, attempt=attempt, waited_for=work.settings.wait)
    job.write_job(jobs=[*_jobs(job), _submit_script(work, after, "--dependency=afterany:" + ":".join(arrays))])
    announce(
        f"{work.pieces.name}: {len(work.missing)} pieces submitted to {tasks} workers as SLURM job {', '.join(arrays)}."
    )


def _submit_script(work: Work, role: Role, option: str) -> str:
    """Submit a batch job that runs the command in this role, and return its id."""
    settings, job = work.settings, work.job
    # As SLURM names a job, to sbatch and in the script.
    job_id = ("%A_%a", "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}") if role.in_array else ("%j", "$SLURM_JOB_ID")
    given = {name: getattr(settings, name) for name in ("partition", "account", "gres", "time", "mem")}
    limit = _seconds_of(settings.time) if settings.time else None
    shortest, longest = _LEAD_SECONDS
    lead = longest if limit is None else min(max(limit // 5, shortest), longest)
    options = [
        f"--job-name=vestige-{job.path.name}",
        f"--cpus-per-task={settings.threads}",
        f"--chdir={Path.cwd()}",
        # The signal goes to the script alone, which has become the worker.
        f"--signal=B:USR1@{lead}",
        "--requeue",
        "--open-mode=append",
        *(f"--{name}={value}" for name, value in given.items() if value is not None),
        f"--output={job.logs}/{job_id[0]}.log",
        option,
    ]
    return _call("sbatch", "--parsable", *options, str(_write_script(work, role, job_id[1]))).strip().split(";")[0]


def _write_script(work: Work, role: Role, log: str) -> Path:
    """Write the script and return its path."""
    settings, job, command = work.settings, work.job, list(work.command)
    environment = worker_environment(settings, job.logs) | role.as_environment()
    lines = ["#!/bin/bash", "set -e"]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    lines.append(f'VESTIGE_LOG+="/{log}.log"')
    if settings.setup:
        lines.append(settings.setup)
    if settings.container:
        # An Apptainer image, with this folder in it, and the GPUs if any.
        folder, cards = str(Path.cwd()), ["--nv"] if settings.gres is not None else []
        inside = ["apptainer", "exec", *cards, "--bind", folder, "--pwd", folder, settings.container]
        command = [*inside, "python", *command[1:]]
    # Signals arrive at the worker: a shell would wait for its child to end first.
    lines.append("exec " + shlex.join(command))
    path = job.path / "slurm" / f"{role.kind}-{role.attempt}{f'-{role.number}' if role.number else ''}.sh"
    make_folder(path.parent)
    write_durably(path, [("\n".join(lines) + "\n").encode()])
    return path.resolve()


def _largest_array() -> int:
    """Return the number of tasks that an array may have here."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", _call("scontrol", "show", "config"), re.MULTILINE)
    # The setting is one more than the largest number of a task.
    return max(int(found[1]) if found else 1001, 1)


def _why_ended(jobs: list[str]) -> str:
    """Return a line for each of the last tasks that did not end well, as far as the site keeps accounts."""
    words = ("--noheader", "--parsable2", "--allocations", "--format=JobID,State,ExitCode", "--jobs=" + ",".join(jobs))
    try:
        rows = [line.split("|") for line in _call("sacct", *words).splitlines() if line.count("|") == 2]
    except UserError:
        return ""
    bad = [row for row in rows if row[1] not in ("COMPLETED", "RUNNING")]
    return "".join(f"\n  job {job}: {state}, exit {code}" for job, state, code in bad[-5:])


def _seconds_of(limit: str) -> int | None:
    """Return the seconds of a limit as sbatch takes it (m, m:s, h:m:s, d-h, d-h:m, d-h:m:s); None for any other."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit.strip())
    if match is None:
        return None
    days, first, second, third = (int(part or 0) for part in match.groups())
    if match[1] is None and match[4] is None:
        return 60 * first + second
    return 86400 * days + 3600 * first + 60 * second + third


def _call(program: str, *words: str, refused: bool = True) -> str:
    """Run the program and return its output; with `refused` False its refusal is no error."""
    try:
        run = subprocess.run([program, *words], capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False)
    except FileNotFoundError:
        raise UserError(
            f"SLURM's {program} is not on this machine's PATH. Type the command on a login node of the cluster, or "
            "use --workers N here, or --shard i/n under another scheduler."
        ) from None
    except subprocess.TimeoutExpired:
        raise SchedulerSilent(
            f"SLURM's {program} did not answer within {_TIMEOUT_SECONDS:.0f} s. When the scheduler is back, run the "
            "same command again: finished pieces are kept."
        ) from None
    if run.returncode and refused:
        if "ontact" in run.stderr and "controller" in run.stderr:
            raise SchedulerSilent(f"SLURM's {program} reached no controller: {run.stderr.strip()}")
        raise UserError(f"SLURM's {program} refused: {run.stderr.strip() or run.stdout.strip()}")
    return run.stdout
