from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.architectures import VOCABULARY
from tests.workshop import furnish
from vestige.checks import DoctorReport, doctor


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, in which the doctor must leave nothing."""
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("VESTIGE_QUIET", "1")
    return folder


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `tiny-model/` and `train.jsonl`."""
    return furnish(tmp_path_factory.mktemp("doctor") / "workshop")


@pytest.fixture
def rows() -> list[dict]:
    """Eight tokenised examples of uneven lengths, some with masked labels."""
    generator = np.random.default_rng(0)
    found = []
    for number in range(8):
        ids = generator.integers(3, VOCABULARY, 4 + (5 * number) % 13).tolist()
        labels = [-100 if place < number % 3 else token for place, token in enumerate(ids)]
        found.append({"id": f"row-{number}", "input_ids": ids, "labels": labels})
    return found


@pytest.fixture
def examined(rows: list[dict]) -> Callable[..., DoctorReport]:
    """The report on a live model and the rows."""

    def run(model: torch.nn.Module, **settings) -> DoctorReport:
        return doctor(**({"model": model, "data": rows} | settings))

    return run
