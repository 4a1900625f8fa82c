"""Real processes share the index, the curvature and the scores, and leave the bytes of a single one."""

import json
import os
import subprocess
import sys

import pytest

from tests.workshop import PAIRS, furnish, write_rows
from vestige.curvature import fisher_path
from vestige.indexes import Index

SMALL_PIECES = """
import sys
if "vestige.cli" in sys.orig_argv:
    import torch
    from vestige.curvature import _fit
    from vestige.indexes import Index
    from vestige.methods import ExactGradients
    torch.set_num_threads(1)
    groups = Index.shard_groups
    Index.shard_groups = lambda self, most: groups(self, 1)
    ExactGradients.piece_tokens, _fit.PIECE_TOKENS = (300, 300), 300
"""
"""What a process does before all else, workers too: every shard, or every few batches, is a piece."""
MODEL = ("--model", "tiny-model", "--data", "train.jsonl", "--token-budget", "60")
ASKED = ("--queries", "asked.jsonl", "--no-trust")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, 48 examples, two questions with answers, and an index of many shards."""
    folder = furnish(tmp_path_factory.mktemp("workers"))
    rows = [
        {"id": f"{turn}-{number}", "prompt": prompt, "completion": f"{completion} {turn}"}
        for turn in range(4)
        for number, (prompt, completion, _) in enumerate(PAIRS)
    ]
    write_rows(folder / "train.jsonl", rows)
    write_rows(folder / "asked.jsonl", [{"prompt": "Who wrote Emma?", "completion": "Jane."}, {"text": "Bees."}])
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(SMALL_PIECES)
    return folder


def vestige(folder, *words, launcher=(sys.executable,), **environment):
    path = os.pathsep.join([str(folder / "site"), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [*launcher, "-m", "vestige.cli", *words],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run


def bytes_of(run):
    record = json.loads((run / "run.json").read_text())
    tables = {name: (run / name).read_bytes() for name in ("scores.parquet", "components.parquet")}
    return tables | {key: record[key] for key in ("distribution", "groups")}


def journals(folder, name):
    """Processes that did something."""
    return list((folder / "launch" / name / "journal").iterdir())


@pytest.mark.slow
def test_two_workers_give_the_bytes_of_one_process_from_index_to_scores(place):
    for name, workers in (("one", "1"), ("two", "2")):
        vestige(place, "index", *MODEL, "--out", name, "--compress", "logra:4x4", "--workers", workers)
        vestige(place, "precondition", name, "--workers", workers, "--out", f"{name}-rows")
        vestige(place, "attribute", "--index", name, *ASKED, "--out", f"{name}-run", "--workers", workers)
    one, two = Index.open(place / "one"), Index.open(place / "two")
    assert len(one.manifest.shard_rows) > 4
    assert one.fingerprint == two.fingerprint
    assert fisher_path(one).read_bytes() == fisher_path(two).read_bytes()
    assert len(journals(place / "two", "curvature")) == len(journals(place / "two", "indexing")) == 2
    rows = sorted(path.name for path in (place / "one-rows").glob("*.safetensors"))
    assert len(rows) > 4
    assert all((place / "one-rows" / name).read_bytes() == (place / "two-rows" / name).read_bytes() for name in rows)
    assert bytes_of(place / "one-run") == bytes_of(place / "two-run")
    assert not (place / ".two-run.partial").exists()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ekfac", "influence"])
def test_without_an_index_too(place, method):
    options = ("--option", "labels=data") if method == "ekfac" else ()
    for workers in ("1", "2"):
        out = f"{method}-{workers}"
        run = vestige(
            place, "attribute", *MODEL, *ASKED, *options, "--method", method, "--out", out, "--workers", workers
        )
    assert "Scoring: 2 workers" in run.stderr
    assert ("Kronecker factors: 2 workers" in run.stderr) == (method == "ekfac")
    assert ("Indexing: 2 workers" in run.stderr) == (method == "influence")
    assert bytes_of(place / f"{method}-1") == bytes_of(place / f"{method}-2")


@pytest.mark.slow
def test_under_torchrun_only_the_first_rank_writes_the_run(place):
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    words = ("attribute", *MODEL, *ASKED, "--method", "grad-dot", "--out")
    vestige(place, *words, "alone")
    vestige(place, *words, "ranks", launcher=torchrun)
    assert bytes_of(place / "alone") == bytes_of(place / "ranks")
    assert not (place / ".ranks.partial").exists()
    assert not list(place.glob(".ranks*"))
