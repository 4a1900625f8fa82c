"""Worker processes on this host: started, watched, replaced when they die."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, final

from vestige.errors import MissingExtra, PieceFailed, UserError
from vestige.launch._pieces import WorkPlan, check_stop
from vestige.launch._record import JobFolder, claim_name, is_number, tail
from vestige.launch._role import Role
from vestige.launch._work import POLL_SECONDS, Meter, ending_well, raise_failures
from vestige.progress import announce, progress
from vestige.settings import LaunchSettings
from vestige.storage import this_host


def worker_command(settings: LaunchSettings, command: str) -> list[str] | None:
    """Return the words of the command with these settings, None if a value lives in this process alone.

    A live module or a list of examples cannot go to another process; work that needs another one raises then
    (`require_command`), so that work in this process needs no command at all.
    """
    given = settings.arguments()
    # Texts would be names of files if they were typed as words.
    lists = [given[name] for name in settings.files if isinstance(given[name], list | tuple)]
    if not all(map(_is_plain, given.values())) or any(isinstance(item, str) for items in lists for item in items):
        return None
    fields = type(settings).model_fields
    defaults = {name: fields[name].default for name in settings.never_repeated if name in fields}
    words = shlex.split(settings.model_copy(update=defaults).command_line(command))
    return [sys.executable, "-m", "vestige.cli", *words[1:]]


def require_command(command: Sequence[str] | None) -> list[str]:
    """Return the command, for work that leaves this process.

    Raises:
        UserError: There is none.
    """
    if command is None:
        raise UserError(
            "Workers in other processes read the model and the data from disk, and one of them was given as a live "
            "Python object or as a list of texts. Save it (model.save_pretrained(FOLDER) with its tokenizer, data and "
            "texts as JSONL) and give the path, or work in this process with workers=1."
        )
    return list(command)


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(isinstance(item, str | int | float | Path) for item in value)
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return value is None or isinstance(value, bool | int | float | str | Path)


_END_SECONDS = 10.0
"""How long a worker may take to reach the end of a batch before it is killed."""
_CHECK_SHARE = 0.05
"""Share of the time that may be spent reading markers."""
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


class _Running(NamedTuple):
    process: subprocess.Popen[bytes]
    log: Path


def work_in_processes(
    plan: WorkPlan[Any], settings: LaunchSettings, job: JobFolder, pieces: Sequence[int], command: list[str]
) -> None:
    """Do the pieces by `settings.workers` processes that run `command`.

    Raises:
        PieceFailed: Pieces failed every time, or workers do not even begin.
        SystemExit: The process received a stop signal.
    """
    count = min(settings.workers, len(pieces))
    announce(f"{plan.name}: {count} workers; their logs are in {job.logs}.")
    pool = _ProcessPool(plan, settings, job, pieces, command)

    def work() -> None:
        with progress(round(sum(map(plan.weight, pieces))), plan.name, plan.unit) as bar:
            try:
                pool.start(count)
                pool.watch(Meter(bar.advance))
            finally:
                pool.end()

    ending_well(plan, work)
    raise_failures(plan, job, pieces)


@final
class _ProcessPool:
    """The worker processes of one driver."""

    def __init__(
        self, plan: WorkPlan[Any], settings: LaunchSettings, job: JobFolder, pieces: Sequence[int], command: list[str]
    ) -> None:
        self._plan, self._settings, self._job, self._command = plan, settings, job, command
        self._left = list(pieces)
        self._running: list[_Running] = []
        self._started = self._early_deaths = 0

    def start(self, count: int) -> None:
        """Start N more workers."""
        for _ in range(count):
            number = self._started
            self._started += 1
            log = self._job.logs / f"worker-{os.getpid()}-{number}.log"
            of = self._settings.workers
            role = Role("worker", str(self._job.path.resolve()), number % of, of, parent=os.getpid())
            with log.open("ab") as file:
                process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=os.environ | worker_environment(self._settings, log) | _device(number) | role.as_environment(),
                )
            self._running.append(_Running(process, log))

    def watch(self, meter: Meter) -> None:
        """Wait until nothing is left: every piece is done, or given up.

        Raises:
            PieceFailed: Workers die before they begin a piece, again and again.
            DiskSpaceError: They do because the disk is full.
            Stopped: The process received a stop signal.
        """
        while True:
            check_stop()
            began = time.perf_counter()
            if not self._count_done(meter):
                return
            self._reap_dead()
            if not self._running:
                self._start_missing(self._settings.workers)
            # A plan of a thousand pieces on a slow disk must not keep its driver busy with reading markers.
            time.sleep(max(POLL_SECONDS, (time.perf_counter() - began) / _CHECK_SHARE))

    def end(self) -> None:
        """End all workers; they give their claims back, and the slow ones are killed."""
        for each in self._running:
            with contextlib.suppress(ProcessLookupError):
                each.process.terminate()
        deadline = time.monotonic() + _END_SECONDS
        for each in self._running:
            try:
                each.process.wait(max(deadline - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                each.process.kill()
                each.process.wait()
        self._running.clear()

    def _count_done(self, meter: Meter) -> bool:
        """Return whether there is still something to do or to wait for."""
        done = {piece for piece in self._left if self._plan.is_done(piece)}
        for piece in done:
            meter.piece(self._plan.weight(piece))
        if done:
            self._early_deaths = 0
        self._left = [piece for piece in self._left if piece not in done]
        failures = [failure for failure in self._job.failures() if failure.piece in set(self._left)]
        given_up = {each.piece for each in failures if each.fatal or each.attempts > self._settings.retries}
        return not any(each.fatal for each in failures) and bool(set(self._left) - given_up)

    def _reap_dead(self) -> None:
        for each in [each for each in self._running if each.process.poll() is not None]:
            self._running.remove(each)
            code = each.process.returncode
            if code == 0:
                continue
            if not self._record_crash(each) and not (code > 0 and self._job.failures()):
                # On a full disk a worker can neither note why it ended nor say it in its log.
                self._job.require_space()
                self._early_deaths += 1
            if self._early_deaths > self._settings.retries + self._settings.workers:
                lines = "\n".join(f"    {line}" for line in tail(str(each.log)))
                raise PieceFailed(
                    f"{self._plan.name}: workers end before they finish a piece ({_cause(code)}). "
                    f"The log is {each.log}:\n{lines}"
                )
            self._start_missing(1)

    def _record_crash(self, dead: _Running) -> bool:
        """Count it against the pieces that a dead worker held, for one may be what killed it."""
        held = False
        for name, owner in self._job.claims.owners().items():
            if owner.worker.pid != dead.process.pid or owner.worker.host != this_host() or not is_number(name):
                continue
            held = True
            claim = self._job.claims.take(name)
            if claim is not None:
                with claim:
                    if not self._plan.is_done(int(name)):
                        message = f"its worker died ({_cause(dead.process.returncode)})"
                        self._job.record_failure(int(name), message, log=str(dead.log))
        return held

    def _start_missing(self, most: int) -> None:
        """Start workers for pieces that no process holds."""
        free = [
            piece
            for piece in self._left
            if self._job.claims.is_free(claim_name(piece))
            and not self._plan.is_done(piece)
            and not self._job.is_given_up(piece, self._settings.retries)
        ]
        self.start(min(most, len(free), self._settings.workers - len(self._running)))


def worker_environment(settings: LaunchSettings, log: Path) -> dict[str, str]:
    """Return the variables of a worker's environment: its threads, its log, and no progress bar."""
    threads = dict.fromkeys(THREAD_VARIABLES, str(settings.threads))
    return threads | {
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "VESTIGE_QUIET": "1",
        "VESTIGE_LOG": str(log),
    }


def _device(number: int) -> dict[str, str]:
    """Give every worker one GPU, round-robin, where there are any."""
    torch = sys.modules.get("torch")
    count = torch.cuda.device_count() if torch is not None else 0
    if not count:
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    return {"CUDA_VISIBLE_DEVICES": visible[number % len(visible)]}


def _cause(code: int) -> str:
    if code >= 0:
        return f"exit status {code}"
    hint = ": often too little memory" if -code == signal.SIGKILL else ""
    return f"{signal.Signals(-code).name}{hint}"


@final
class Share:
    """Every `count`-th piece of a command's work: what a submitit executor calls in a job.

    Submitit pickles it, calls it in the job, and calls `checkpoint` when the job's time is nearly over or it is
    preempted: the share is then submitted again and continues.
    """

    def __init__(self, words: Sequence[str], number: int, count: int) -> None:
        self.words = [*words, "--shard", f"{number}/{count}"]
        self._process: subprocess.Popen[str] | None = None

    def __call__(self) -> str:
        """Run the command and return its output; the share that does the last piece also finishes the result.

        Raises:
            PieceFailed: It failed; the message holds the end of its output.
        """
        command = [sys.executable, "-m", "vestige.cli", *self.words]
        # A process of its own, so that submitit's signal handlers and Vestige's do not replace each other.
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        output, _ = self._process.communicate()
        if self._process.returncode:
            raise PieceFailed(f"{shlex.join(['vestige', *self.words])} failed:\n{output[-_SHOWN:]}")
        return output

    def checkpoint(self) -> Any:
        """Return the same share, to be submitted again; its process has ended at a batch boundary, or was killed."""
        from submitit.helpers import DelayedSubmission

        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(_PATIENCE_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process = None
        return DelayedSubmission(self)

    def __getstate__(self) -> dict[str, Any]:
        return {"words": self.words, "_process": None}


_SHOWN = 4000
_PATIENCE_SECONDS = 20.0
"""How long the command may take to reach the end of its batch; SLURM kills everything some 30 seconds later."""


def shares(command: str | Sequence[str], count: int) -> list[Share]:
    """Return a command's work in `count` shares, each to be submitted: `executor.submit(share)`.

    Args:
        command: As it is typed, `vestige` included or not, such as `"vestige index --model M --data D --out IDX"`.
        count: How many jobs.

    Raises:
        UserError: The count is below 1, or the command says itself where to run.
        MissingExtra: submitit is not installed.
    """
    try:
        import submitit  # noqa: F401
    except ImportError as error:
        raise MissingExtra("Shares of a command need submitit: pip install 'vestige[submitit]'") from error
    words = shlex.split(command) if isinstance(command, str) else list(command)
    words = words[1:] if words[:1] == ["vestige"] else words
    if count < 1:
        raise UserError(f"{count} shares were requested; give a number of jobs above 0.")
    if taken := [word for word in words if word.split("=")[0] in ("--shard", "--engine", "--workers")]:
        raise UserError(f"Leave {' and '.join(taken)} out: the executor decides where the shares run.")
    return [Share(words, number, count) for number in range(1, count + 1)]
