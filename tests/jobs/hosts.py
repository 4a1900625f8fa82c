"""Two hosts on one machine: network namespaces joined by a cable, each with a name of its own."""

import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest


class Host(NamedTuple):
    """One of the two; `address` is how the other one reaches it."""

    name: str
    address: str
    interface: str
    hosts_file: Path

    def start(self, command: Sequence[str], environment: dict[str, str], **options) -> subprocess.Popen:
        """The command with this host's network, host name and hosts file."""
        script = f'mount --bind {self.hosts_file} /etc/hosts && hostname {self.name} && exec "$@"'
        inside = ["nsenter", f"--net=/run/netns/{self.name}", "unshare", "-u", "-m", "sh", "-c", script, "sh", *command]
        return subprocess.Popen(inside, env=os.environ | environment, start_new_session=True, **options)


@contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    mark = secrets.token_hex(2)
    names, addresses = [f"h{mark}A", f"h{mark}B"], ["10.77.0.1", "10.77.0.2"]
    file = folder / "hosts"
    lines = [f"{address} {name}" for name, address in zip(names, addresses, strict=True)]
    file.write_text("\n".join(["127.0.0.1 localhost", *lines]) + "\n")
    hosts = [Host(name, address, f"v{name}", file) for name, address in zip(names, addresses, strict=True)]
    try:
        _join(*hosts)
        yield hosts[0], hosts[1]
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "del", host.name], capture_output=True, check=False)


def _join(first: Host, second: Host) -> None:
    steps = [f"netns add {first.name}", f"netns add {second.name}"]
    steps += [f"link add {first.interface} type veth peer name {second.interface}"]
    for host in (first, second):
        steps += [
            f"link set {host.interface} netns {host.name}",
            f"-n {host.name} addr add {host.address}/24 dev {host.interface}",
            f"-n {host.name} link set lo up",
            f"-n {host.name} link set {host.interface} up",
        ]
    for step in steps:
        try:
            run = subprocess.run(["ip", *step.split()], capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip("no second host: the program ip (package iproute2) is not installed")
        if run.returncode:
            pytest.skip(f"no second host: ip {step} was refused ({run.stderr.strip()}); that needs CAP_SYS_ADMIN")


def torchrun(hosts: Sequence[Host], program: Sequence[str], port: int = 29519, **options) -> list[subprocess.Popen]:
    """The program under torchrun on both hosts, one rank on each."""
    started = []
    for number, host in enumerate(hosts):
        words = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={number}"]
        words += ["--nproc-per-node=1", f"--master-addr={hosts[0].address}", f"--master-port={port}", *program]
        environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": host.interface}
        started.append(host.start(words, environment, **options))
    return started


def kill(process: subprocess.Popen) -> None:
    """`kill -9` of all that was started there, as when a host dies."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
