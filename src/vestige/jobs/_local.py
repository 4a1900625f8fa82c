"""The engine of this machine: N processes, one per core or per GPU, each with its share of the pieces."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import final

from vestige.jobs._command import worker_environment
from vestige.jobs._engine import Work
from vestige.jobs._pool import PoolEngine, Start
from vestige.jobs._worker import Role


@final
class LocalEngine(PoolEngine):
    """Worker processes on this host. One that dies is replaced, and its replacement takes its share and its GPU."""

    @contextmanager
    def connect(self, work: Work) -> Iterator[Start]:
        """Yield the function that starts a process."""

        def start(number: int, role: Role, log: Path) -> "subprocess.Popen[bytes]":
            environment = worker_environment(work.settings, log) | _device(number) | role.as_environment()
            with log.open("ab") as file:
                return subprocess.Popen(
                    work.command,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=os.environ | environment,
                )

        yield start


def _device(number: int) -> dict[str, str]:
    """Give every worker one GPU, round-robin, where there are any."""
    torch = sys.modules.get("torch")
    count = torch.cuda.device_count() if torch is not None else 0
    if not count:
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    return {"CUDA_VISIBLE_DEVICES": visible[number % len(visible)]}


LOCAL = LocalEngine()
