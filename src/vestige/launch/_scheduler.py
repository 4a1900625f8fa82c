"""SLURM's commands, each with a time-out: against a controller that is down they would wait for minutes."""

import re
import shutil
import subprocess
from collections.abc import Sequence

from vestige.errors import UserError

TIMEOUT_SECONDS = 30.0
_DEFAULT_ARRAY_SIZE = 1001
_OVER = ("CANCELLED", "COMPLETED", "FAILED", "TIMEOUT", "BOOT_FAIL", "DEADLINE", "NODE_FAIL", "OUT_OF_MEMORY")


class SchedulerSilent(UserError):
    """The scheduler did not answer, or not in time."""


def submit(options: Sequence[str], script: str) -> str:
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


def cancel_jobs(jobs: Sequence[str]) -> None:
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
