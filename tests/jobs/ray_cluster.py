"""A real Ray on this machine, of two nodes with one core each, thrown away after the tests."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import psutil

MARK = "VESTIGE_TEST_RAY"
"""Variable that every process of a node inherits, so that none of them is left at the end."""
MEMORY = 100 * 2**20


class Cluster:
    """A head and one more node, each a raylet with what it started."""

    def __init__(self) -> None:
        self.token = secrets.token_hex(8)
        # A socket's path may have 107 letters.
        self.folder = Path(tempfile.mkdtemp(prefix="vray"))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        # It does its work when its input ends: at `stop`, or because this process is gone, however that ended.
        words = [sys.executable, "-m", "tests.jobs.ray_cluster", self.token, str(self.folder)]
        self._reaper = subprocess.Popen(words, stdin=subprocess.PIPE, start_new_session=True)

    def start(self) -> None:
        port = self.address.split(":")[1]
        words = ["--head", "--node-ip-address=127.0.0.1", f"--port={port}", f"--temp-dir={self.folder}"]
        self._start("head", [*words, "--include-dashboard=false", "--disable-usage-stats"])
        self.start_node()

    def start_node(self) -> None:
        """Start the second node, unless it lives."""
        if not self.processes("node", "raylet"):
            self._start("node", [f"--address={self.address}", "--node-ip-address=127.0.0.1"])

    def kill_node(self) -> None:
        """`kill -9` of the second raylet."""
        (raylet,) = self.processes("node", "raylet")
        raylet.kill()
        raylet.wait(10)

    def processes(self, node: str, name: str = "") -> list[psutil.Process]:
        """The processes of a node, "head" or "node", whose name begins so."""
        return marked(f"{self.token}-{node}", name)

    def stop(self) -> None:
        """Have every process that was started here ended, and the folder removed."""
        self._reaper.communicate(timeout=60)

    def _start(self, node: str, words: list[str]) -> None:
        # Ray asks for a token if an earlier one has left its own in the home folder.
        plain = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
        environment = os.environ | plain | {MARK: f"{self.token}-{node}"}
        program = [sys.executable, "-m", "ray.scripts.scripts", "start"]
        with (self.folder / f"{node}.log").open("ab") as log:
            done = subprocess.run(
                [*program, *words, "--num-cpus=1", f"--object-store-memory={MEMORY}"],
                env=environment,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                timeout=180,
                check=False,
            )
        assert done.returncode == 0, (self.folder / f"{node}.log").read_text()


def marked(mark: str, name: str = "") -> list[psutil.Process]:
    """The processes whose mark and whose name begin so."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK, "").startswith(mark) and process.name().startswith(name):
                found.append(process)
    return found


def reap(token: str, folder: str) -> None:
    """Wait for the end of the input; then end every process of the cluster, and remove its folder."""
    sys.stdin.read()
    while left := marked(token):
        for process in left:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, 5)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    reap(*sys.argv[1:])
