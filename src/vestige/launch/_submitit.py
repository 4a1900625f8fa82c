"""Shares of a command as tasks of a submitit executor, for people whose jobs all go through one."""

import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, final

from vestige.errors import MissingExtra, PieceFailed, UserError


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
        said, _ = self._process.communicate()
        if self._process.returncode:
            raise PieceFailed(f"{shlex.join(['vestige', *self.words])} failed:\n{said[-_SHOWN:]}")
        return said

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
