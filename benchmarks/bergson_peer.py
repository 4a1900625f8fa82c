"""The peer bergson, kept ready in its own interpreter so that its runs can be interleaved with ours."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from measure import Measurement, folder_bytes


class Bergson:
    """A running `bergson_server.py`; use it as a context."""

    def __init__(self, python: str, folder: Path, core: int) -> None:
        server = Path(__file__).with_name("bergson_server.py")
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": "", "TQDM_DISABLE": "1"}
        self._log = (folder / "bergson.log").open("w")
        self._process = subprocess.Popen(
            [python, str(server), str(folder), str(core)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
            text=True,
        )
        self.version = self._read()["ready"]

    def __enter__(self) -> "Bergson":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()
        self._log.close()

    def build(self, workload: str, out: Path, **options: Any) -> Measurement:
        """An index of projected gradients, 16 x 16 for each linear map."""
        return Measurement(**self.ask(do="build", workload=workload, out=str(out), **options))

    def score(self, workload: str, queries: str, out: Path) -> Measurement:
        """Exact scores without an index, left as `OUT.npy` [query, example]."""
        return Measurement(**self.ask(do="score", workload=workload, queries=queries, out=str(out)))

    def ask(self, **request: Any) -> dict[str, Any]:
        """The server's answer to one request."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._log.flush()
            sys.exit(f"bergson stopped; the end of its log:\n{Path(self._log.name).read_text()[-2000:]}")
        return json.loads(line)


def bergson_command(python: str, folder: Path, workload: str, out: Path) -> list[str]:
    """The command line that builds the same index from text, as a user would type it."""
    program = str(Path(python).with_name("bergson"))
    options = ["--model", str(folder / "model"), "--dataset", str(folder / f"{workload}.jsonl"), "--truncation", "True"]
    # A batch may not be larger than the model's context in bergson.
    return [program, "build", str(out), *options, "--projection_dim", "16", "--token_batch_size", "512"]


def run_command(command: list[str], leaves: Path) -> Measurement:
    """A command from start to exit, its children included."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    wall = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed:\n{output[-2000:]}")
    cpu = usage.ru_utime + usage.ru_stime
    # The peak that the kernel reports for a child includes this process, from which it was split off: left out.
    return Measurement(cpu, time.perf_counter() - wall, 0, folder_bytes(leaves))
