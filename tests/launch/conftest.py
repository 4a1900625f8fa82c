"""A SLURM for the tests that need one; a loud skip where it cannot be."""

import warnings

import pytest

from tests.launch import slurm


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
    monkeypatch.setattr("vestige.launch._slurm._QUEUE_SECONDS", 1.0)
    return cluster
