"""A SLURM and a Ray for the tests that need one; a loud skip where it cannot be."""

import os
import shlex
import warnings
from pathlib import Path

import pytest

from tests.jobs import ray_cluster, slurm


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    reason = slurm.why_not()
    if reason is not None:
        print(f"\n{'#' * 80}\n# NO SLURM: {reason}\n# The tests of --engine slurm are SKIPPED.\n{'#' * 80}")
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            warnings.warn(f"SLURM tests skipped: {reason}", stacklevel=1)
        pytest.skip(reason)
    cluster = slurm.start(tmp_path_factory.mktemp("slurm"))
    yield cluster
    slurm.stop(cluster)


@pytest.fixture
def on_slurm(cluster, monkeypatch):
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("VESTIGE_QUEUE_SECONDS", "1")
    return cluster


@pytest.fixture
def paper_slurm(tmp_path_factory, monkeypatch):
    """A SLURM that only writes down what is submitted; call it for the options and script of every job so far.

    Set VESTIGE_TEST_ARRAY_SIZE to the largest number of tasks of an array.
    """
    folder = tmp_path_factory.mktemp("paper")
    submit = f'printf "%q " "$@" >> {folder}/jobs; echo >> {folder}/jobs; wc -l < {folder}/jobs'
    size = 'echo "MaxArraySize = ${VESTIGE_TEST_ARRAY_SIZE:-1001}"'
    for name, line in {"sbatch": submit, "squeue": "true", "scontrol": size}.items():
        (folder / name).write_text(f"#!/bin/bash\n{line}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return lambda: [shlex.split(line)[1:] for line in Path(folder / "jobs").read_text().splitlines()]


@pytest.fixture(scope="module")
def two_nodes():
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'vestige[ray]'")
    cluster = ray_cluster.Cluster()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def on_ray(two_nodes):
    """The cluster, with both nodes alive."""
    two_nodes.start_node()
    return two_nodes


@pytest.fixture
def own_ray(monkeypatch):
    """No cluster: what Ray starts by itself in this test is found and ended as if it were the head."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'vestige[ray]'")
    cluster = ray_cluster.Cluster()
    monkeypatch.setenv(ray_cluster.MARK, f"{cluster.token}-head")
    monkeypatch.setenv("RAY_TMPDIR", str(cluster.folder))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    yield cluster
    monkeypatch.undo()
    cluster.stop()
