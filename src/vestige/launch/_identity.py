"""Which process does a piece, and whether it still lives."""

import os
import secrets
from typing import NamedTuple

import psutil

from vestige.files import this_host


class Worker(NamedTuple):
    """A process as another one can look it up, also after process numbers were given out again."""

    host: str
    """Host and process namespace: containers count their processes themselves."""
    pid: int
    born: float
    """When the process started, in seconds since 1970 as its host counts them."""
    job: str
    """Id of its batch job, empty outside a scheduler."""
    token: str
    """Its own, so that a claim can be known again."""


_TOKEN = secrets.token_hex(4)


def this_worker() -> Worker:
    """This process."""
    pid = os.getpid()
    return Worker(this_host(), pid, psutil.Process(pid).create_time(), job_id(), f"{_TOKEN}-{pid}")


def job_id() -> str:
    """The batch job that this process belongs to, as `squeue` writes it: 17 or 17_3."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")


def is_alive(worker: Worker) -> bool | None:
    """Whether the process lives; None if it ran on another host, where this one cannot look."""
    if worker.host != this_host():
        return None
    try:
        process = psutil.Process(worker.pid)
        # The kernel counts in hundredths of a second since the start; the start itself may be corrected a little.
        same = abs(process.create_time() - worker.born) < 2
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True
