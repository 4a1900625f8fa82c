"""A tiny model, its data and queries on disk, and a small bank's settings."""

import hashlib
from pathlib import Path

import pytest
import torch

from tests.workshop import furnish, write_rows

QUERIES = [
    {"id": "sky", "prompt": "Tell me why the sky looks blue.", "completion": "Air scatters blue light.", "source": "p"},
    {"id": "paris", "text": "Paris is the capital of France."},
]


@pytest.fixture(scope="session")
def workshop(tmp_path_factory) -> Path:
    folder = furnish(tmp_path_factory.mktemp("bank") / "workshop")
    write_rows(folder / "queries.jsonl", QUERIES)
    return folder


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def recipe(workshop, tmp_path):
    """Settings of a bank of four models with two steps each."""
    return {
        "model": str(workshop / "tiny-model"),
        "data": str(workshop / "train.jsonl"),
        "queries": str(workshop / "queries.jsonl"),
        "out": tmp_path / "bank",
        "subsets": 2,
        "seeds": 2,
        "steps": 2,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "device": "cpu",
    }


def contents(folder: Path) -> dict[str, str]:
    """sha256 of every file of a bank but the job's record."""
    files = [path for path in folder.rglob("*") if path.is_file() and "launch" not in path.parts]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
