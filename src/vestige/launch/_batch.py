"""The batch scripts: the command that was typed, in the environment of a worker."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from vestige.launch import _scheduler as scheduler
from vestige.launch._local import worker_environment
from vestige.launch._record import JobFolder
from vestige.launch._role import Role
from vestige.settings import LaunchSettings
from vestige.storage import make_folder, write_durably

_LEAD_SECONDS = (10, 120)
"""Shortest and longest warning before the time limit; a fifth of the limit between them."""


def submit_array(settings: LaunchSettings, job: JobFolder, role: Role, tasks: int, command: Sequence[str]) -> list[str]:
    """Submit arrays whose tasks run `command` as workers, several where one may not be so large; return their ids."""
    largest = scheduler.largest_array()
    script = _script(settings, job, role, "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}", command)
    ids = []
    for first in range(0, tasks, largest):
        last = min(first + largest, tasks) - first - 1
        log = f"--output={job.logs}/%A_%a.log"
        ids.append(scheduler.submit([*_options(settings, job), log, f"--array=0-{last}"], str(script)))
    return ids


def submit_reduce(
    settings: LaunchSettings, job: JobFolder, role: Role, after: Sequence[str], command: Sequence[str]
) -> str:
    """Submit the job that continues from what the arrays left, in whatever state they ended; return its id."""
    script = _script(settings, job, role, "${SLURM_JOB_ID}", command)
    dependency = "--dependency=afterany:" + ":".join(after)
    return scheduler.submit([*_options(settings, job), f"--output={job.logs}/%j-reduce.log", dependency], str(script))


def _options(settings: LaunchSettings, job: JobFolder) -> list[str]:
    given = {name: getattr(settings, name) for name in ("partition", "account", "gres", "time", "mem")}
    limit = scheduler.seconds_of(settings.time) if settings.time else None
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
