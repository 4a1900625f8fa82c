import json

import pytest
from tests.jobs.conftest import cluster as cluster, on_slurm as on_slurm, paper_slurm as paper_slurm

from vestige_recipes.sweep import sweep


def write_texts(folder):
    """Texts and questions; bm25 scores them without a model, in a tenth of a second."""
    texts = ["the sky is blue", "grass is green", "rome is in italy", "bees make honey", "ants have six legs"]
    rows = [{"id": f"t{number}", "text": text} for number, text in enumerate(texts)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[::-1]))
    (folder / "questions.jsonl").write_text(json.dumps({"id": "q", "text": "is the sky green"}) + "\n")


def lexical(axes, mode="product", verb="attribute", **base):
    """A grid of lexical scores; what is given replaces its parts."""
    shared = {"data": "train.jsonl", "queries": "questions.jsonl", "method": "bm25"} | base
    shared = {name: value for name, value in shared.items() if name not in axes}
    return {"verb": verb, "mode": mode, "base": shared, "axes": axes}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with texts, in which the test is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VESTIGE_QUIET", "1")
    write_texts(tmp_path)
    return tmp_path


@pytest.fixture
def grid(here):
    """Makes grids of lexical scores."""
    return lexical


@pytest.fixture
def run(here):
    """Runs a grid in this process, into `sw`."""

    def call(content, **settings):
        return sweep(content, out=here / "sw", **settings)

    return call


def results(folder):
    """Scores of every cell as bytes, by cell and file: what must not depend on who made them, and when."""
    found = {}
    for path in sorted((folder / "cells").rglob("*")):
        if path.is_file() and "out" in path.parts and path.suffix in (".parquet", ".safetensors"):
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found
