"""The engine of a Ray cluster: actors, one for each worker, wherever the cluster has a place for them.

Ray places the actors, and starts again those whose process or node died. Each runs a worker process, which loads the
model once and computes its share; the markers on the disk that all nodes see show what is done.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

from vestige.errors import MissingExtra, SpecError, UserError
from vestige.jobs._engine import Work
from vestige.jobs._local import PoolEngine, Start
from vestige.jobs._worker import Role, start_worker, worker_environment
from vestige.progress import announce

_ANSWER_SECONDS = 10.0


@final
class RayEngine(PoolEngine):
    """Workers are actors of a Ray cluster, which end with the process that started them."""

    @contextmanager
    def connect(self, work: Work) -> Iterator[Start]:
        """Connect to the cluster, unless this process is connected, and yield the function that starts an actor.

        Raises:
            MissingExtra: Ray is not installed.
            UserError: No cluster answers at the address, or it is of another version.
        """
        ray, address = _import_ray(), work.settings.address
        is_ours = address is not None or not ray.is_initialized()
        if is_ours:
            _init(ray, address)
        try:
            cards = _cards(ray, work)
            actor_class = ray.remote(
                num_cpus=work.settings.threads,
                num_gpus=cards,
                max_restarts=work.settings.retries,
                # The same share again: what is done of it is left alone.
                max_task_retries=work.settings.retries,
                # One thread waits for the worker process, others may end it.
                max_concurrency=4,
            )(RayActor)

            def start(_: int, role: Role, log: Path) -> "_ActorProcess":
                environment = worker_environment(work.settings, log)
                # No worker takes a card that Ray may have given to another one.
                environment |= {} if cards else {"CUDA_VISIBLE_DEVICES": ""}
                actor = actor_class.remote()
                end = actor.run.remote(list(work.command), environment, tuple(role), str(log.resolve()), os.getcwd())
                return _ActorProcess(ray, actor, end, log)

            yield start
        finally:
            if is_ours:
                ray.shutdown()


@final
class RayActor:
    """Runs a worker process on the node where Ray has placed the actor."""

    _process: "subprocess.Popen[bytes] | None" = None

    def run(self, command: list[str], environment: dict[str, str], role: tuple[Any, ...], log: str, folder: str) -> int:
        """Run the command in this role to its end, and return its exit status.

        Raises:
            OSError: This node does not see the folders of the node where the command was typed.
        """
        # Ray repeats a call of which it heard no more.
        self.stop()
        # The process ends at its next batch when the actor is gone. The interpreter is that of this node.
        environment |= Role(*role)._replace(parent=os.getpid()).as_environment()
        self._process = start_worker([sys.executable, *command[1:]], environment, Path(log), folder)
        return self._process.wait()

    def stop(self) -> None:
        """Request the end of the process after its batch."""
        if self._process is not None:
            self._process.terminate()


@final
class _ActorProcess:
    """The worker process of an actor, as the driver sees it."""

    def __init__(self, ray: Any, actor: Any, end: Any, log: Path) -> None:
        self._ray, self._actor, self._end, self._log = ray, actor, end, log

    def poll(self) -> int | str | None:
        """Return the exit status, or what became of the actor.

        Raises:
            UserError: The process could not be started on its node.
        """
        if not self._ray.wait([self._end], timeout=0)[0]:
            return None
        try:
            return self._ray.get(self._end)
        except self._ray.exceptions.RayActorError as error:
            if error.actor_init_failed:
                raise _refusal(error) from error
            return f"Ray lost its actor: {' '.join(str(error).split())}"
        except self._ray.exceptions.RayTaskError as error:
            raise _refusal(error.cause or error) from error

    def terminate(self) -> None:
        """Request the end of the process after its batch; end the actor if Ray has not placed it yet."""
        if self._log.exists():
            # Not again if the actor has gone by then: Ray would print that among the results.
            self._actor.stop.options(max_task_retries=0).remote()
        else:
            self.kill()

    def wait(self, timeout: float) -> None:
        """Wait for the end of the process.

        Raises:
            subprocess.TimeoutExpired: It has not come in this many seconds.
        """
        if not self._ray.wait([self._end], timeout=timeout)[0]:
            raise subprocess.TimeoutExpired("run", timeout)

    def kill(self) -> None:
        """End the actor; its place is free for another one."""
        self._ray.kill(self._actor)


def _import_ray() -> Any:
    try:
        import ray.exceptions
    except ImportError as error:
        raise MissingExtra("--engine ray needs Ray.\nType: pip install 'vestige[ray]'") from error
    return ray


def _init(ray: Any, address: str | None) -> None:
    given = address or os.environ.get("RAY_ADDRESS") or "auto"
    where = "on this machine" if given == "auto" else f"at {given} ({'--address' if address else 'RAY_ADDRESS'})"
    if "://" in given:
        raise SpecError(
            f"The address {given} is one of Ray's client or jobs server, and the folder of the result must be seen "
            f"where the command runs. Run it on a node of the cluster: ray job submit --address {given} -- vestige ..."
        )
    handler = signal.getsignal(signal.SIGTERM)
    try:
        if ":" in given:
            # Ray itself tries for minutes.
            host, _, port = given.rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), _ANSWER_SECONDS).close()
        # A cluster that Ray starts here for want of one reports nothing to anybody and has no dashboard.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    except (OSError, RuntimeError, ValueError, OverflowError) as error:
        raise UserError(
            f"No Ray cluster that can be used was found {where}: {error}\n"
            "Start one with `ray start --head` and give the address that it prints, such as --address 10.0.0.1:6379, "
            "or leave --address out on a node of the cluster."
        ) from error
    finally:
        # Ray's own would end the process at once.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _cards(ray: Any, work: Work) -> float:
    """Return the GPUs of each worker: one if the cluster has any, unless the settings say otherwise."""
    settings, nodes = work.settings, [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cards = settings.gpus_per_worker
    if cards is None:
        cards = 1.0 if any(node.get("GPU") for node in nodes) else 0.0
    if not any(node.get("CPU", 0) >= settings.threads and node.get("GPU", 0) >= cards for node in nodes):
        announce(
            f"{work.pieces.name}: no node of the Ray cluster has {settings.threads} CPUs (--threads) and {cards:g} "
            "GPUs (--gpus-per-worker) for a worker. The workers wait until Ray adds one; Ctrl-C ends the wait."
        )
    return cards


def _refusal(error: BaseException) -> UserError:
    return UserError(
        f"A worker could not be started on its node of the Ray cluster: {error}\n"
        "Every node must see this folder and that of the result at the same paths (a shared disk), and have the same "
        "Python with Vestige."
    )


RAY = RayEngine()
