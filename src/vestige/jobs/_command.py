"""The command that a worker runs to come to the same pieces as its driver, and shares of a command for submitit."""

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, final

from vestige.errors import MissingExtra, PieceFailed, UserError
from vestige.settings import LaunchSettings

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

    Raises:
        OSError: The folder or that of the log is not here.
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
