"""How far the jobs of a folder are, and their end on request; read from what they left there, by any process."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from vestige.errors import UserError
from vestige.jobs._engine import ENGINES
from vestige.jobs._record import Failure, JobFolder, ranges
from vestige.jobs._worker import WORKER, WorkerId, is_alive, works_on
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
            tried = "once" if failure.attempts == 1 else f"{failure.attempts} times"
            where = f"; log: {failure.log}" if failure.log else ""
            shown.append(f"  failed      piece {failure.piece}, {tried}: {failure.kind}: {failure.error}{where}")
        return shown


def job_statuses(folder: Path) -> list[JobStatus]:
    """Return the status of every job that has worked on `folder`, in the order in which they began."""
    statuses = [(job.read_job(), job) for job in _jobs_of(folder)]
    return [_status(record, job) for record, job in sorted(statuses, key=lambda each: each[0].get("begun", 0))]


def cancel_jobs(folder: Path) -> list[str]:
    """End what is running for `folder` at its next batch; what is finished stays.

    Returns:
        What was ended, for a person; empty if nothing was running.

    Raises:
        UserError: Nothing has ever run there, or the scheduler does not answer.
    """
    jobs = list(_jobs_of(folder))
    if not jobs:
        raise UserError(f"No job has worked on {folder}. Give the folder that a command got as --out.")
    return [line for job in jobs for line in _cancel(job)]


def _jobs_of(folder: Path) -> Iterator[JobFolder]:
    for path in sorted((folder / "launch").glob("*/job.json")):
        yield JobFolder(path.parent)


def _status(record: dict[str, Any], job: JobFolder) -> JobStatus:
    entries = job.entries()
    since = [entry for entry in entries if entry.piece >= 0 and entry.ended >= record["begun"]]
    done = len({entry.piece for entry in since})
    weight = sum({entry.piece: entry.weight for entry in since}.values())
    running = tuple(sorted(set(_at_work(record, job).values())))
    elapsed = (record.get("ended") or time.time()) - record["begun"]
    rate = weight / elapsed if elapsed > 0 else 0.0
    to_do = record["weight"] - record["weight_before"] - weight
    seconds = [(entry.seconds * entry.cores, entry.seconds * entry.gpus) for entry in entries]
    return JobStatus(
        name=record["name"],
        unit=record["unit"],
        state=_state(record, job, bool(running)),
        pieces=record["pieces"],
        done=record["pieces"] if record.get("ended") else record["done_before"] + done,
        running=running,
        failures=tuple(job.failures()),
        rate=rate,
        seconds_left=to_do / rate if rate and to_do > 0 else None,
        core_hours=sum(cores for cores, _ in seconds) / 3600,
        gpu_hours=sum(gpus for _, gpus in seconds) / 3600,
        jobs=tuple(record.get("jobs", ())),
        logs=job.logs,
    )


def _at_work(record: dict[str, Any], job: JobFolder) -> dict[WorkerId, int]:
    """Return the pieces that processes which live, or ran on other hosts and may live, have begun since the job."""
    found = dict[WorkerId, int]()
    for noted in job.journals():
        if noted.worker is None or noted.at_work is None or noted.written < record["begun"]:
            continue
        if is_alive(noted.worker) is not False:
            found[noted.worker] = noted.at_work
    return found


def _state(record: dict[str, Any], job: JobFolder, running: bool) -> str:
    if record.get("ended"):
        return "done"
    if record.get("cancelled"):
        return "cancelled"
    driver = _driver(record)
    if running or (driver is not None and is_alive(driver)):
        return "running"
    try:
        at_work = any(engine.status(job) for engine in ENGINES)
    except UserError:
        return "unknown: the scheduler does not answer"
    return "running" if at_work else "stopped: the same command continues it"


def _cancel(job: JobFolder) -> Iterator[str]:
    record = job.read_job()
    if record.get("ended"):
        return
    # First of all: a job that comes after an array must not submit again what is being cancelled.
    job.write_job(cancelled=time.time())
    for engine in ENGINES:
        yield from engine.cancel(job)
    driver = _driver(record)
    workers = {worker.token: worker for worker in [*_at_work(record, job), *([driver] if driver else [])]}
    for worker in workers.values():
        if worker.host != this_host():
            if not worker.job:
                yield f"{record['name']}: process {worker.pid} runs on {worker.host}: type the same command there."
        elif not is_alive(worker) or worker.pid == os.getpid():
            continue
        elif works_on(worker, job.path):
            os.kill(worker.pid, signal.SIGTERM)
            yield f"{record['name']}: process {worker.pid} ends after its batch."
        else:
            yield (
                f"{record['name']}: process {worker.pid} is named in {job.path}, and is no command of yours that works "
                "there: it was left alone. If you know better, end it with `kill`."
            )


def _driver(record: dict[str, Any]) -> WorkerId | None:
    return WORKER.validate_python(record["driver"]) if record.get("driver") else None
