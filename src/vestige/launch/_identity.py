"""Which process does a piece, and whether it still lives."""

import os
import secrets
from pathlib import Path
from typing import NamedTuple

import psutil

from vestige.files import this_host


class Worker(NamedTuple):
    """A process as another one can look it up, also after process numbers were given out again."""

    host: str
    """Host and process namespace: containers count their processes themselves."""
    pid: int
    born: float
    """When the process started, in seconds since its host did: setting the host's clock does not move it."""
    job: str
    """Id of its batch job, empty outside a scheduler."""
    token: str
    """Its own, so that a claim can be known again."""


_TOKEN = secrets.token_hex(4)


def this_worker() -> Worker:
    """This process."""
    pid = os.getpid()
    return Worker(this_host(), pid, _born(psutil.Process(pid)), job_id(), f"{_TOKEN}-{pid}")


def job_id() -> str:
    """The batch job that this process belongs to, as `squeue` writes it: 17 or 17_3."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")


def _born(process: psutil.Process) -> float:
    try:
        # The name of the program, in parentheses, may hold blanks; the start is the 22nd field, in ticks.
        fields = Path(f"/proc/{process.pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
        return int(fields.split()[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, ValueError):  # not Linux, or gone by now
        return process.create_time()


def is_alive(worker: Worker) -> bool | None:
    """Whether the process lives; None if it ran on another host, where this one cannot look."""
    if worker.host != this_host():
        return None
    try:
        process = psutil.Process(worker.pid)
        return _born(process) == worker.born and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True
