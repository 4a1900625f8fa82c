"""Runs with planted scores, and an index with planted near copies, over the same twelve examples."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from tests.workshop import furnish, write_rows
from vestige.indexes import index
from vestige.methods import attribute

QUERIES = [
    {"id": "sky", "prompt": "Why is the sky so blue?", "completion": "Air scatters blue light.", "source": "nature"},
    {"id": "france", "prompt": "The capital of France?", "completion": "It is Paris.", "source": "places"},
    {"id": "ant", "prompt": "Legs of an ant?", "completion": "An ant has six.", "source": "nature"},
]


@pytest.fixture(scope="session")
def workshop(tmp_path_factory):
    torch.set_num_threads(1)
    folder = furnish(tmp_path_factory.mktemp("select"))
    write_rows(folder / "q.jsonl", QUERIES)
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    # Two rows are copies of earlier ones under ids of their own, and one column is nobody's business.
    rows[8] |= {"prompt": rows[0]["prompt"], "completion": rows[0]["completion"]}
    rows[9] |= {"prompt": rows[2]["prompt"], "completion": rows[2]["completion"]}
    write_rows(folder / "train.jsonl", [row | {"page": number} for number, row in enumerate(rows)])
    return folder


@pytest.fixture(scope="session")
def given(workshop):
    return {"model": str(workshop / "tiny-model"), "data": str(workshop / "train.jsonl")}


@pytest.fixture(scope="session")
def run(workshop, given):
    folder = workshop / "run"
    attribute(**given, queries=str(workshop / "q.jsonl"), method="grad-dot", out=folder, dense=True, trust=False, k=3)
    return folder


@pytest.fixture(scope="session")
def store(workshop, given):
    index(**given, out=workshop / "idx", compress="sjlt:32", dtype="float32")
    return workshop / "idx"


@pytest.fixture
def planted(run, tmp_path):
    """A function that puts scores [query, example] in place of a run's, and returns the run's folder."""

    def plant(scores, name="planted"):
        folder = tmp_path / name
        shutil.copytree(run, folder)
        path = folder / "scores.safetensors"
        from safetensors import safe_open

        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata()
        assert load_file(path)["scores"].shape == np.shape(scores)
        save_file({"scores": np.ascontiguousarray(scores, dtype=np.float32)}, path, metadata)
        record = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps(record | {"files": {}}))
        return folder

    return plant
