"""A real SLURM on this machine, of two nodes with one core each, thrown away after the tests."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
NODES = 2

_CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthInfo=socket={folder}/run/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=10
KillWait=5
DefMemPerCPU=500
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=1 RealMemory=4000
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=10
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""


class Cluster(NamedTuple):
    """Where it lives; clients need only `environment`."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}


def why_not() -> str | None:
    """Why no SLURM can be started here, None if one can."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"{', '.join(missing)} not installed: apt-get install slurmctld slurmd slurm-client munge"
    return None if os.geteuid() == 0 else "SLURM's daemons need root here"


def start(folder: Path) -> Cluster:
    for name in ("state", "log", "spool", "run"):
        (folder / name).mkdir(parents=True)
    for path in (folder, folder / "run"):
        path.chmod(0o755)
    host, port = socket.gethostname().split(".")[0], _free_ports(NODES + 1)
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    run = folder / "run"
    _check(
        [
            "munged",
            "--force",
            f"--key-file={key}",
            f"--socket={run}/munge.sock",
            f"--pid-file={run}/munged.pid",
            f"--log-file={folder}/log/munged.log",
            f"--seed-file={run}/seed",
        ]
    )
    values = {"host": host, "folder": folder, "nodes": NODES, "port": port, "first": port + 1, "last": port + NODES}
    (folder / "slurm.conf").write_text(_CONFIG.format(**values))
    cluster = Cluster(folder)
    _check(["slurmctld", "-i"], cluster)
    for node in range(1, NODES + 1):
        start_node(cluster, f"n{node}")
    wait_until_idle(cluster)
    return cluster


def start_node(cluster: Cluster, node: str) -> None:
    _check(["slurmd", "-N", node], cluster)


def wait_until_idle(cluster: Cluster, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while ask(cluster, "sinfo", "-hN", "-p", "main", "-o", "%t").split() != ["idle"] * NODES:
        assert time.monotonic() < deadline, (cluster.folder / "log" / "slurmctld.log").read_text()[-2000:]
        time.sleep(0.1)


def kill_node(cluster: Cluster, node: str) -> None:
    """`kill -9` of the node's slurmd alone; what it started lives on."""
    os.kill(int((cluster.folder / "run" / f"slurmd.{node}.pid").read_text()), signal.SIGKILL)


def node_of(cluster: Cluster, job: str) -> str:
    """The node that a task of an array runs on."""
    return ask(cluster, "squeue", "-h", "-j", job, "-o", "%N").strip()


def stop(cluster: Cluster) -> None:
    ask(cluster, "scancel", "-u", "root")
    pids = [path for pattern in ("slurmd.*.pid", "slurmctld.pid", "munged.pid") for path in _pids(cluster, pattern)]
    for path in pids:
        subprocess.run(["kill", path.read_text().strip()], check=False, capture_output=True)


def ask(cluster: Cluster, *words: str) -> str:
    environment = os.environ | cluster.environment
    run = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120, check=False)
    return run.stdout


def _pids(cluster: Cluster, pattern: str) -> list[Path]:
    return list((cluster.folder / "run").glob(pattern))


def _check(words: list[str], cluster: Cluster | None = None) -> None:
    environment = os.environ | (cluster.environment if cluster else {})
    # The daemons keep the pipes of their parent open: output goes nowhere, and their logs say the rest.
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(words, env=environment, check=True, timeout=120, **quiet)


def _free_ports(count: int) -> int:
    """The first of so many ports in a row that nobody listens on."""
    for first in range(17001 + os.getpid() % 4000, 60000, count):
        try:
            for port in range(first, first + count):
                with socket.socket() as one:
                    one.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise AssertionError("no free ports")
