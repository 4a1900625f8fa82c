"""A workshop with a tiny model and rows to train on, for tests of `vestige train`."""

from pathlib import Path

import pytest
import torch

from tests.workshop import furnish


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    return furnish(tmp_path_factory.mktemp("workshop"))


@pytest.fixture
def settled(workshop, monkeypatch) -> dict:
    """The work is done in the workshop and without a word; the settings that all trainings share."""
    monkeypatch.chdir(workshop)
    monkeypatch.setenv("VESTIGE_QUIET", "1")
    return {"model": "tiny-model", "batch_size": 2, "learning_rate": 1e-2}
