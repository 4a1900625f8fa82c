"""Which process works on a job: as another process can find it again, and never mistake another one for it."""

import json
import os
import secrets
from pathlib import Path
from typing import NamedTuple

import psutil
from pydantic import FiniteFloat, PositiveInt, TypeAdapter

from vestige.distributed import ROLE_VARIABLE
from vestige.storage import find_result_folder, is_held_by, this_host


class Worker(NamedTuple):
    """A process as another one can find it, also after process numbers were given out again."""

    host: str
    """Host and process namespace: containers count their processes themselves."""
    pid: PositiveInt
    born: FiniteFloat
    """When the process started, in seconds since its host did: setting the host's clock does not move it."""
    job: str
    """Id of its batch job, empty outside a scheduler."""
    token: str
    """Its own: process numbers are given out again."""


_LONGEST_PATH = 4096
_TOKEN = secrets.token_hex(4)


WORKER = TypeAdapter(Worker)
"""Validates what a file holds about a process."""


def this_worker() -> Worker:
    """Return the identity of this process."""
    pid = os.getpid()
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    # As `squeue` writes it: 17 or 17_3.
    job = f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")
    return Worker(this_host(), pid, start_time(psutil.Process(pid)), job, f"{_TOKEN}-{pid}")


def start_time(process: psutil.Process) -> float:
    """Return when a process started, in seconds since its host did, or since 1970 where that is not known."""
    try:
        # The name of the program, in parentheses, may hold blanks; the start is the 22nd field, in ticks.
        fields = Path(f"/proc/{process.pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
        return int(fields.split()[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, ValueError):  # not Linux, or gone by now
        return process.create_time()


def works_on(worker: Worker, job: Path) -> bool:
    """Return whether the process is one of ours, of this user, that works on the job folder.

    A file names it, which any user may have written; what the process is, only the system knows.
    """
    try:
        process = psutil.Process(worker.pid)
        if process.uids().real != os.getuid():
            return False
        role = process.environ().get(ROLE_VARIABLE)
        if role is not None and json.loads(role).get("job") == str(job.resolve()):
            return True
        result = find_result_folder(job.resolve().parent.parent)
        if any(is_held_by(folder, worker.pid) for folder in (result, *result.parents[:-1])):
            return True
        words, place = process.cmdline(), Path(process.cwd())
        is_ours = any(Path(word).name == "vestige" for word in words[:2]) or "vestige.cli" in words[:4]
        named = ((place / word.split("=", 1)[-1]).resolve() for word in words[1:] if len(word) < _LONGEST_PATH)
        return is_ours and result in named
    except (psutil.Error, OSError, ValueError, AttributeError):
        return False


def is_alive(worker: Worker) -> bool | None:
    """Return whether the process lives; None if it ran on another host, where this one cannot check."""
    if worker.host != this_host():
        return None
    try:
        process = psutil.Process(worker.pid)
        return start_time(process) == worker.born and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True
