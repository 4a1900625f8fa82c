"""Worker processes: the command they run, their part in a job, who they are to others, and shares for submitit."""

import json
import os
import secrets
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple, final

import psutil
from pydantic import FiniteFloat, PositiveInt

from vestige.distributed import ROLE_VARIABLE, in_process_group, launched_rank
from vestige.errors import MissingExtra, PieceFailed, UserError, VestigeError
from vestige.settings import LaunchSettings
from vestige.storage import find_result_folder, is_held_by, this_host

POLL_SECONDS = 0.2
"""Between two checks of what other processes do."""


class WorkerId(NamedTuple):
    """A process as another one can find it, also after process numbers were given out again."""

    host: str
    """Host and process namespace: containers count their processes themselves."""
    pid: PositiveInt
    born: FiniteFloat
    """When the process started, in seconds since its host did: setting the host's clock does not move it."""
    job: str
    """Name of its log, which of a SLURM job is its id, such as 17_3; empty for a process that a person started."""
    token: str
    """Its own: process numbers are given out again."""


_LONGEST_PATH = 4096
_TOKEN = secrets.token_hex(4)


def this_worker() -> WorkerId:
    """Return the identity of this process."""
    pid = os.getpid()
    log = os.environ.get("VESTIGE_LOG")
    job = os.environ.get("SLURM_JOB_ID", "") if log is None else Path(log).stem
    return WorkerId(this_host(), pid, start_time(psutil.Process(pid)), job, f"{_TOKEN}-{pid}")


def start_time(process: psutil.Process) -> float:
    """Return when a process started, in seconds since its host did, or since 1970 where that is not known."""
    try:
        # The name of the program, in parentheses, may hold blanks; the start is the 22nd field, in ticks.
        fields = Path(f"/proc/{process.pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
        return int(fields.split()[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, ValueError):  # not Linux, or gone by now
        return process.create_time()


def works_on(worker: WorkerId, job: Path) -> bool:
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


def is_alive(worker: WorkerId) -> bool | None:
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


class Role(NamedTuple):
    """A process's part in a job."""

    kind: Literal["driver", "worker", "reduce", "rank"]
    job: str = ""
    """The job folder that a worker works on; of another job, it only takes the result."""
    number: int = 0
    of: int = 1
    """Which of how many."""
    in_array: bool = False
    """Whether the number of the batch array's task is to be added."""
    parent: int | None = None
    """Process of the driver on this host, whose end ends the worker."""
    shares: str = ""
    """File with the numbers of the pieces, of which a worker computes every `of`-th."""
    attempt: int = 0
    waited_for: bool = False
    """Whether a driver waits for the job and goes on by itself."""

    def as_environment(self) -> dict[str, str]:
        """Return the variable that makes a child process play this role."""
        return {ROLE_VARIABLE: json.dumps(self._asdict())}


def this_role(environment: Mapping[str, str] = os.environ) -> Role:
    """Return the role that the environment gives this process: Vestige's own variable, else that of torchrun."""
    given = environment.get(ROLE_VARIABLE)
    if given:
        role = Role(**json.loads(given))
        # The tasks of a batch array have the same environment but for their number.
        return role._replace(number=role.number + int(environment["SLURM_ARRAY_TASK_ID"])) if role.in_array else role
    launched = launched_rank(environment)
    if launched is None or in_process_group():
        return Role("driver")
    return Role("rank", number=launched.rank, of=launched.world_size)


def is_worker() -> bool:
    """Return whether a driver started this process to do a part of its job, and has prepared everything."""
    return this_role().kind in ("worker", "reduce")


def is_one_of_several() -> bool:
    """Return whether torchrun or accelerate started this process as one of several that run the same program."""
    return this_role().kind == "rank"


def refuse_overwrite_by_ranks() -> None:
    """Raise in a rank of torchrun, for a command with `overwrite`.

    Raises:
        UserError: This process is one of several ranks.
    """
    if is_one_of_several():
        raise UserError(
            "--overwrite under torchrun would have every rank delete what the others make. Delete the folder first, "
            "and run the command without --overwrite."
        )


def is_follower() -> bool:
    """Return whether torchrun or accelerate started this process as a rank that leaves writing to the first one."""
    role = this_role()
    return role.kind == "rank" and role.number > 0


def follow(result: Path, work: Callable[[], object]) -> None:
    """Do `work` as far as it is needed, and wait until the first rank has written the file `result`.

    The first rank may be done with everything, and tidy up, before this one checks. Should the first one fail,
    torchrun ends the others.
    """
    launched = psutil.Process(os.getppid()).create_time()

    def is_written() -> bool:
        try:
            return result.stat().st_mtime >= launched
        except OSError:
            return False

    try:
        if not is_written():
            work()
    except (VestigeError, OSError):
        if not is_written():
            raise
    while not is_written():
        time.sleep(POLL_SECONDS)


_PARTS = (
    ROLE_VARIABLE,
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "ROLE_NAME"),
    *("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"),
)
"""What gives a process its part in a job, for Vestige and torch.distributed; of the latter all or nothing: a Trainer
that finds LOCAL_RANK alone makes a process group of one and wraps its model in it."""
CARDS, _PLACE = "CUDA_VISIBLE_DEVICES", "SLURM_LOCALID"
"""Where the GPU of a rank is set instead: for CUDA, and should CUDA have read it before, for ourselves."""


@contextmanager
def own_jobs() -> Iterator[None]:
    """Let this process start jobs of its own while the block runs, whatever its part in the job around it.

    For a piece that is itself a command: without this, a command inside a worker would take itself for a worker of its
    own job, and wait for a driver that there is not. A rank of torchrun keeps its GPU and uses no other.
    """
    card = _card_of_rank() if is_one_of_several() else {}
    before = {name: os.environ.pop(name) for name in (*_PARTS, *card) if name in os.environ}
    os.environ.update(card)
    try:
        yield
    finally:
        for name in (*_PARTS, *card):
            os.environ.pop(name, None)
        os.environ.update(before)


def _card_of_rank() -> dict[str, str]:
    import torch

    place = os.environ.get("LOCAL_RANK", "")
    # Counting them does not make CUDA read its environment, which it does once.
    count = torch.cuda.device_count()
    return {CARDS: choose_card(int(place), count), _PLACE: place} if place.isdigit() and count else {}


def choose_card(number: int, count: int) -> str:
    """Return the GPU of a process, round-robin, out of those that this one sees or, if all, of `count`."""
    visible = os.environ.get(CARDS, ",".join(map(str, range(count)))).split(",")
    return visible[number % len(visible)]


THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


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
    # A worker must not delete what others made.
    kept = {"overwrite": False} if "overwrite" in type(settings).model_fields else {}
    words = shlex.split(settings.model_copy(update=kept).command_line(command))
    return [sys.executable, "-m", "vestige.cli", *words[1:]]


def require_command(command: Sequence[str] | None) -> list[str]:
    """Return the command, for work that leaves this process; raise UserError where there is none."""
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


def worker_environment(settings: LaunchSettings, log: Path) -> dict[str, str]:
    """Return the variables of a worker's environment: its threads, its log, and no progress bar."""
    threads = dict.fromkeys(THREAD_VARIABLES, str(settings.threads))
    return threads | {
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "VESTIGE_QUIET": "1",
        "VESTIGE_LOG": str(log),
    }


def start_worker(
    command: Sequence[str], environment: Mapping[str, str], log: Path, folder: str | None = None
) -> "subprocess.Popen[bytes]":
    """Start a worker's command in a folder, with these variables beside those of this process; it prints into the log.

    OSError if the folder, or that of the log, is not here.
    """
    with log.open("ab") as file:
        return subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )


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

        if self._process is not None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_PATIENCE_SECONDS)
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
