"""How far the jobs of a folder are, and their end on request; read from what they left there, by any process."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from vestige.errors import UserError
from vestige.jobs._engine import ENGINES
from vestige.jobs._record import Failure, JobFolder, Record, ranges
from vestige.jobs._worker import WorkerId, is_alive, works_on
from vestige.progress import format_seconds
from vestige.storage import this_host


class JobStatus(NamedTuple):
    """One plan's work, as its record has it."""

    name: str
    unit: str
    state: str
    """done, running, stopped or cancelled."""
    pieces: int
    done: int
    running: tuple[int, ...]
    """Pieces that living workers hold."""
    failures: tuple[Failure, ...]
    rate: float
    """Units a second since the job began; 0 before its first piece is done."""
    seconds_left: float | None
    core_hours: float
    gpu_hours: float
    jobs: tuple[str, ...]
    """Ids of its batch jobs."""
    logs: Path

    def lines(self) -> list[str]:
        """Return the status for a person."""
        left = f", {format_seconds(self.seconds_left)} left" if self.seconds_left and self.state == "running" else ""
        held = f", {len(self.running)} at work ({ranges(self.running)})" if self.running else ""
        shown = [
            f"{self.name}: {self.state}",
            f"  pieces      {self.done} of {self.pieces} done{held}",
            f"  rate        {self.rate:,.1f} {self.unit}/s{left}",
            f"  cost        {self.core_hours:.2f} core-hours, {self.gpu_hours:.2f} GPU-hours",
        ]
        shown += [f"  jobs        {' '.join(self.jobs)}"] if self.jobs else []
        for failure in self.failures:
            where = f"; log: {failure.log}" if failure.log else ""
            shown.append(
                f"  failed      piece {failure.piece}, {failure.tries}: {failure.kind}: {failure.error}{where}"
            )
        return shown


def job_statuses(folder: Path) -> list[JobStatus]:
    """Return the status of every job that has worked on `folder`, in the order in which they began."""
    return [_status(record, job) for record, job in _jobs_of(folder)]


def cancel_jobs(folder: Path) -> list[str]:
    """End what is running for `folder` at its next batch; what is finished stays.

    Returns:
        What was ended, for a person; empty if nothing was running.

    Raises:
        UserError: Nothing has ever run there, or the scheduler does not answer.
    """
    jobs = _jobs_of(folder)
    if not jobs:
        raise UserError(f"No job has worked on {folder}. Give the folder that a command got as --out.")
    return [line for record, job in jobs for line in _cancel(record, job)]


def _jobs_of(folder: Path) -> list[tuple[Record, JobFolder]]:
    found = [(job.record(), job) for job in (JobFolder(path.parent) for path in folder.glob("launch/*/job.json"))]
    return sorted(((record, job) for record, job in found if record), key=lambda each: each[0].begun)


def _status(record: Record, job: JobFolder) -> JobStatus:
    entries = job.entries()
    since = {entry.piece: entry.weight for entry in entries if entry.piece >= 0 and entry.ended >= record.begun}
    running = tuple(sorted(set(_at_work(record, job).values())))
    elapsed = (record.ended or time.time()) - record.begun
    rate = sum(since.values()) / elapsed if elapsed > 0 else 0.0
    to_do = record.weight - record.weight_before - sum(since.values())
    return JobStatus(
        name=record.name,
        unit=record.unit,
        state=_state(record, job, bool(running)),
        pieces=record.pieces,
        done=record.pieces if record.ended else record.done_before + len(since),
        running=running,
        failures=tuple(job.failures()),
        rate=rate,
        seconds_left=to_do / rate if rate and to_do > 0 else None,
        core_hours=sum(entry.seconds * entry.cores for entry in entries) / 3600,
        gpu_hours=sum(entry.seconds * entry.gpus for entry in entries) / 3600,
        jobs=tuple(record.jobs),
        logs=job.logs,
    )


def _at_work(record: Record, job: JobFolder) -> dict[WorkerId, int]:
    """Return the pieces that processes which live, or ran on other hosts and may live, have begun since the job."""
    begun = {each.worker: each.at_work for each in job.journals() if each.written >= record.begun}
    return {
        worker: piece
        for worker, piece in begun.items()
        if worker is not None and piece is not None and is_alive(worker) is not False
    }


def _state(record: Record, job: JobFolder, running: bool) -> str:
    if record.ended:
        return "done"
    if record.cancelled:
        return "cancelled"
    if running or (record.driver is not None and is_alive(record.driver)):
        return "running"
    try:
        at_work = any(engine.status(job) for engine in ENGINES)
    except UserError:
        return "unknown: the scheduler does not answer"
    return "running" if at_work else "stopped: the same command continues it"


def _cancel(record: Record, job: JobFolder) -> Iterator[str]:
    if record.ended:
        return
    # First of all: a job that comes after an array must not submit again what is being cancelled.
    job.write_job(cancelled=time.time())
    for engine in ENGINES:
        yield from engine.cancel(job)
    workers = _at_work(record, job) | ({record.driver: -1} if record.driver else {})
    for worker in workers:
        if worker.host != this_host():
            if not worker.job:
                yield f"{record.name}: process {worker.pid} runs on {worker.host}: type the same command there."
        elif not is_alive(worker) or worker.pid == os.getpid():
            continue
        elif works_on(worker, job.path):
            os.kill(worker.pid, signal.SIGTERM)
            yield f"{record.name}: process {worker.pid} ends after its batch."
        else:
            yield (
                f"{record.name}: process {worker.pid} is named in {job.path}, and is no command of yours that works "
                "there: it was left alone. If you know better, end it with `kill`."
            )
