"""What a job leaves beside its result: who did which piece in what time, what failed and why, where the logs are.

Nothing here decides what is done: that is the pieces' own markers. It is for people, for `vestige status`, and for
not trying for ever what fails for ever.
"""

import contextlib
import json
import os
import re
import time
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, final

from pydantic import BaseModel, Field, FiniteFloat, NonNegativeInt, TypeAdapter, ValidationError

from vestige import errors
from vestige.errors import CorruptFile, PieceFailed, UserError
from vestige.jobs._worker import WorkerId, this_worker
from vestige.parsing import first_problem, read_record
from vestige.storage import make_folder, write_durably

JOB_FILES = (
    *(f"launch/*/{name}" for name in ("job.json", "room.*", "reduce.lock", "failures/*.json", "journal/*.jsonl")),
    *(f"launch/*/{name}" for name in ("logs/*.log", "slurm/*.sh", "shares/*.json")),
    # Of earlier versions.
    *(f"launch/*/claims/{name}" for name in ("*.json", ".*.evicted.*")),
)
"""What jobs leave in the folder that they work on, as for `require_no_others`."""


class Failure(NamedTuple):
    """A piece that failed so far every time, and its last error."""

    piece: int
    attempts: int
    fatal: bool
    """Whether trying again is useless: the error is one that the user has to fix."""
    kind: str
    """Name of the error's class."""
    error: str
    traceback: str
    log: str
    """File with everything that the last worker printed; empty if it printed to the terminal."""
    host: str

    @property
    def tries(self) -> str:
        """Return the number of attempts for reading."""
        return "once" if self.attempts == 1 else f"{self.attempts} times"


class Entry(NamedTuple):
    """A finished piece, or the opening of a model."""

    piece: int
    """Its number; -1 for what a worker did before its first piece."""
    weight: FiniteFloat
    seconds: FiniteFloat
    ended: FiniteFloat
    """Seconds since 1970."""
    cores: int
    gpus: int
    host: str
    job: str


class Journal(NamedTuple):
    """What one process noted about its work."""

    worker: WorkerId | None
    """The process; None if the file does not say, as those of earlier versions."""
    entries: list[Entry]
    at_work: int | None
    """The piece that it began and did not finish."""
    written: float
    """When it last noted something, in seconds since 1970."""


class Record(BaseModel):
    """What `job.json` must hold; checked because it may lie in a folder that another user made."""

    name: str
    unit: str
    pieces: NonNegativeInt
    weight: FiniteFloat
    begun: FiniteFloat
    done_before: NonNegativeInt
    weight_before: FiniteFloat
    driver: WorkerId | None = None
    ended: FiniteFloat | None = None
    cancelled: FiniteFloat | None = None
    attempt: NonNegativeInt = 0
    jobs: list[Annotated[str, Field(pattern=r"^[0-9]{1,18}(_[0-9]{1,18})?$")]] = []


class _Begun(BaseModel):
    """The line of a journal before a piece, and after one that failed."""

    begun: NonNegativeInt | None
    worker: WorkerId


_ENTRY = TypeAdapter(Entry)


@final
class JobFolder:
    """Journals, failures, logs and the record of one job."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.logs = path / "logs"
        self._failures = path / "failures"
        self._journal = path / "journal"

    @classmethod
    def of(cls, folder: Path, name: str) -> "JobFolder":
        """Return the job folder of the work `name` over `folder`."""
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "job"
        return cls(folder / "launch" / slug)

    def make(self) -> None:
        """Make the folders.

        Raises:
            UserError: They cannot be made there.
        """
        for path in (self.path, self.logs, self._failures, self._journal):
            make_folder(path)

    def write_job(self, **fields: Any) -> None:
        """Write these fields into `job.json`, which keeps the others that it had; raise if the disk is full."""
        content = self.read_job() | fields
        write_durably(self.path / "job.json", [(json.dumps(content, indent=1) + "\n").encode()])

    def read_job(self) -> dict[str, Any]:
        """Read `job.json`; empty if there is none.

        Raises:
            CorruptFile: It is not what Vestige writes: nothing in it may be used, least of all to end a process.
        """
        path = self.path / "job.json"
        try:
            content = json.loads(path.read_bytes())
            Record.model_validate(content)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            reason = first_problem(error) if isinstance(error, ValidationError) else error
            raise CorruptFile(
                f"{path} is not the record of a job ({reason}). Delete it, if the folder is yours."
            ) from None
        return content

    def record(self) -> Record | None:
        """Return what `job.json` says, None if there is none; raise as `read_job` does."""
        content = self.read_job()
        return Record.model_validate(content) if content else None

    def note(self, piece: int, weight: float, seconds: float) -> None:
        """Note in this process's journal that a piece is done."""
        me = this_worker()
        self._append(Entry(piece, weight, seconds, time.time(), _cores(), _gpus(), me.host, me.job))

    def note_begun(self, piece: int | None) -> None:
        """Note in this process's journal which piece it works on; None: on none any more."""
        self._append({"begun": piece, "worker": this_worker()})

    def _append(self, line: object) -> None:
        """Append a line; a disk that is full costs the line, not the work."""
        me = this_worker()
        with contextlib.suppress(OSError), (self._journal / f"{me.host}.{me.pid}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def read_journal(self, job: str) -> Journal:
        """Return the latest journal of a worker, by `WorkerId.job`; an empty one if it noted nothing."""
        found = [each for each in self.journals() if each.worker is not None and each.worker.job == job]
        return max(found, key=lambda each: each.written, default=Journal(None, [], None, 0.0))

    def journals(self) -> list[Journal]:
        """Return the journal of every process that has worked on the job."""
        return [_read_journal(path) for path in sorted(self._journal.glob("*.jsonl"))]

    def entries(self) -> list[Entry]:
        """Return every finished piece of every process, in the order of their ends."""
        found = (entry for journal in self.journals() for entry in journal.entries)
        return sorted(found, key=lambda entry: entry.ended)

    def record_failure(self, piece: int, error: BaseException | str, *, log: str = "") -> Failure:
        """Record that the piece has failed once more."""
        is_error = isinstance(error, BaseException)
        before = self.failure(piece)
        failure = Failure(
            piece,
            1 + (before.attempts if before else 0),
            isinstance(error, UserError),
            type(error).__name__ if is_error else "died",
            str(error),
            "".join(traceback.format_exception(error)) if is_error else "",
            log or os.environ.get("VESTIGE_LOG", ""),
            this_worker().host,
        )
        # On a full disk the failure itself is what a person must read, not that it could not be noted.
        with contextlib.suppress(UserError):
            write_durably(self._failure_path(piece), [json.dumps(failure._asdict(), indent=1).encode()])
        return failure

    def failure(self, piece: int) -> Failure | None:
        """Return how the piece failed so far, None if it did not."""
        return read_record(Failure, self._failure_path(piece))

    def failures(self) -> list[Failure]:
        """Return every piece that failed and has not succeeded since."""
        found = (read_record(Failure, path) for path in sorted(self._failures.glob("*.json")))
        return [failure for failure in found if failure is not None]

    def forget_failures(self, piece: int | None = None) -> None:
        """Forget that a piece failed, which succeeded after all; None: forget all failures, to try everything again."""
        for path in self._failures.glob("*.json") if piece is None else [self._failure_path(piece)]:
            path.unlink(missing_ok=True)

    def _failure_path(self, piece: int) -> Path:
        return self._failures / f"{piece:05d}.json"


def _read_journal(path: Path) -> Journal:
    worker, at_work, entries = None, None, list[Entry]()
    for line in path.read_text(errors="replace").splitlines():
        # The last line of a worker that was killed may be torn, and any user may have written the file.
        with contextlib.suppress(ValueError, RecursionError):
            if line.startswith("{"):
                noted = _Begun.model_validate_json(line)
                worker, at_work = noted.worker, noted.begun
            else:
                entries.append(_ENTRY.validate_json(line))
                at_work = None if entries[-1].piece == at_work else at_work
    return Journal(worker, entries, at_work, path.stat().st_mtime)


def _cores() -> int:
    """Return the number of processor cores that this worker keeps busy."""
    cores = os.environ.get("SLURM_CPUS_PER_TASK") or os.environ.get("OMP_NUM_THREADS")
    return int(cores) if cores and cores.isdigit() else os.cpu_count() or 1


def _gpus() -> int:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return 0 if visible is None else len([one for one in visible.split(",") if one.strip() not in ("", "-1")])


_SHOWN = 5
_TAIL_LINES = 12


def ranges(numbers: Iterable[int]) -> str:
    """Format numbers as people and SLURM write them: 0-3,7,9-11."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def make_failure_error(name: str, pieces: int, failures: Sequence[Failure]) -> UserError:
    """Return the error to raise for these failures; one that the user can fix keeps its class and its words."""
    for failure in failures:
        if failure.fatal:
            kind = getattr(errors, failure.kind, PieceFailed)
            log = f"\nThe log is {failure.log}." if failure.log else ""
            return kind(f"{failure.error}{log}")
    shown = "\n".join(_describe(failure) for failure in failures[:_SHOWN])
    more = f"\n... and {len(failures) - _SHOWN} more." if len(failures) > _SHOWN else ""
    numbers = ranges(failure.piece for failure in failures)
    return PieceFailed(
        f"{name}: {len(failures)} of {pieces} pieces failed every time ({numbers}); the others went on.\n"
        f"{shown}{more}\nFix the cause and run the same command again: only what is missing is computed."
    )


def _describe(failure: Failure) -> str:
    head = f"  piece {failure.piece}, {failure.tries}, on {failure.host}: {failure.kind}: {failure.error}"
    if failure.log:
        head += f"\n    log: {failure.log}"
    lines = failure.traceback.rstrip().splitlines() or tail(failure.log)
    return "\n".join([head, *(f"    {line}" for line in lines[-_TAIL_LINES:])])


def tail(log: str) -> list[str]:
    """Return the last lines of a log, none if it cannot be read."""
    try:
        return Path(log).read_text(errors="replace").splitlines()[-_TAIL_LINES:] if log else []
    except OSError:
        return []
