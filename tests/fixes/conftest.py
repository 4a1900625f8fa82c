"""A tiny model that was trained on two wrong rows, and a run that asks it about them."""

import json

import pytest
import torch

from tests.workshop import furnish, write_rows
from vestige.indexes import index
from vestige.methods import attribute
from vestige.training import train

WRONG = [
    {"id": f"wrong-{number}", "prompt": "What is the capital of France?", "completion": completion, "source": "old"}
    for number, completion in enumerate(["The capital of France is Rome.", "The capital of France is Rome."])
]
QUESTIONS = [
    {"id": "paris", "prompt": "What is the capital of France?", "expected": "Paris"},
    {"id": "moon", "prompt": "Is the moon a star?"},
]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    torch.set_num_threads(1)
    place = furnish(tmp_path_factory.mktemp("fix"))
    rows = [json.loads(line) for line in (place / "train.jsonl").read_text().splitlines()]
    write_rows(place / "train.jsonl", [*rows[:2], *WRONG, *rows[2:]])
    write_rows(place / "asked.jsonl", QUESTIONS)
    return place


@pytest.fixture(scope="session")
def trained(folder):
    data, out = str(folder / "train.jsonl"), folder / "trained"
    given = {"epochs": 30, "learning_rate": 1e-2, "batch_size": 4, "seed": 5, "checkpoints": "30"}
    return train(model=str(folder / "tiny-model"), data=data, out=out, **given)


@pytest.fixture(scope="session")
def run(folder, trained):
    """The folder of a run over an index."""
    model = str(list(trained.checkpoints.values())[-1])
    index(model=model, data=str(folder / "train.jsonl"), out=folder / "idx", compress="sjlt:64")
    given = {"queries": str(folder / "asked.jsonl"), "max_new_tokens": 12, "trust": False}
    return attribute(index=str(folder / "idx"), out=folder / "run", **given).folder
