"""The verbs one after another, as a person types them, and what they print."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest

from tests.cli.conftest import contents, index_words, spoil, tokens_only_in
from tests.workshop import PAIRS
from vestige.runs import Scores

ASK = ("attribute", "--index", "idx", "--queries", "Why is the sky blue?")


@pytest.mark.slow
def test_the_doctor_finds_nothing_wrong_here_and_leaves_nothing_behind(vestige, workshop):
    before = contents(workshop)
    outcome = vestige("doctor", "--model", "tiny-model", "--data", "train.jsonl")
    assert outcome.status == 0, outcome.out
    assert "tensorsketch:256" in outcome.out
    assert contents(workshop) == before


@pytest.mark.slow
def test_the_doctor_ends_with_status_1_when_something_is_bad(vestige, workshop):
    spoil(Path("tiny-model"), "model.embed_tokens.weight", rows=tokens_only_in("pair-9"))
    outcome = vestige("doctor", "--model", "tiny-model", "--data", "train.jsonl")
    assert outcome.status == 1
    assert "BAD" in outcome.out


@pytest.mark.slow
def test_indexing_says_beforehand_what_it_costs_and_afterwards_what_is_there(vestige, workshop):
    outcome = vestige(*index_words(), "--out", "new")
    assert outcome.status == 0
    assert "parameters" in outcome.err
    assert "of disk" in outcome.err
    assert vestige("status", "new").out.startswith(outcome.out + "Indexing: done\n")
    assert outcome.out.startswith("new: complete\n")
    assert "examples    12 of 12 of train.jsonl" in outcome.out
    assert "tensorsketch:256 per component" in outcome.out


def test_the_same_command_again_changes_nothing(vestige, idx):
    before = contents(idx)
    assert vestige(*index_words(), "--out", "idx").status == 0
    assert contents(idx) == before


@pytest.mark.slow
def test_parts_of_an_index_make_the_whole(vestige, workshop):
    small = (*index_words(), "--token-budget", "64")
    assert vestige(*small, "--out", "parts", "--shard", "2/2").status == 0
    half = vestige("status", "parts").out
    assert half.startswith("parts: incomplete: the command that began it continues it\n")
    assert vestige(*small, "--out", "parts", "--shard", "1/2").status == 0
    assert vestige(*small, "--out", "whole").status == 0
    assert contents(Path("parts")) == contents(Path("whole"))


@pytest.mark.slow
def test_an_answer_is_traced_reported_and_described(vestige, idx):
    outcome = vestige(*ASK, "--out", "run", "--k", "3", "--tokens", "--dense")
    assert outcome.status == 0
    assert "proponents of query" in outcome.out
    assert "Why is the sky blue?" in outcome.out
    assert "Sign: " in outcome.out
    for check in Scores.open("run").run.trust.checks:
        assert f"[{check.verdict}] {check.name}: {check.reading}" in outcome.out
    assert outcome.err.endswith("Next: vestige report run\n")
    scores = Scores.open("run")
    assert len(scores.listed(0, "proponent")) == 3
    assert scores.dense().shape == (1, len(PAIRS))
    assert vestige("report", "run").out == f"{Path('run', 'report.html')}\n"
    assert Path("run/report.html").stat().st_size > 10_000
    described = vestige("status", "run").out
    assert described.startswith("run: 1 queries against 12 examples by influence\n")
    assert scores.meaning.sign in described


@pytest.mark.slow
def test_a_run_is_replayed_from_its_record(vestige, idx):
    assert vestige(*ASK, "--out", "run", "--damping", "0.5", "--k", "4", "--no-trust").status == 0
    record = json.loads(Path("run/run.json").read_text())
    assert record["config"]["damping"] == 0.5
    assert vestige("attribute", "--config", "run/run.json", "--out", "again").status == 0
    first, second = Scores.open("run"), Scores.open("again")
    assert [tuple(row) for row in first.top(0)] == [tuple(row) for row in second.top(0)]


@pytest.mark.slow
def test_the_command_in_the_record_is_the_one_that_was_typed(vestige, idx):
    words = (*ASK, "--out", "run", "--method", "grad-dot", "--no-trust", "--k", "3")
    assert vestige(*words).status == 0
    command = json.loads(Path("run/run.json").read_text())["command"]
    typed = shlex.split(command)
    assert typed[:2] == ["vestige", "attribute"]
    assert vestige(*typed[1:], "--overwrite").status == 0


@pytest.mark.slow
@pytest.mark.parametrize("method", ["grad-dot", "bm25"])
def test_without_an_index_nothing_but_the_run_is_stored(method, vestige, workshop):
    words = ("--model", "tiny-model", "--data", "train.jsonl", "--queries", "questions.jsonl", "--method", method)
    outcome = vestige("attribute", *words, "--out", "run", "--no-trust")
    assert outcome.status == 0
    assert outcome.out.count("proponents of query") == 2
    assert {path.name for path in workshop.iterdir()} == {"tiny-model", "train.jsonl", "questions.jsonl", "run"}


@pytest.mark.parametrize(
    ("to", "file"), [("numpy", "gradients.npy"), ("arrow", "index.arrow"), ("parquet", "index.parquet")]
)
def test_an_index_is_exported(to, file, vestige, idx):
    outcome = vestige("export", "idx", "--to", to, "--out", "exported")
    assert outcome.status == 0
    assert str(Path("exported", file)) in outcome.out.splitlines()
    if to == "numpy":
        assert np.load("exported/gradients.npy").shape[0] == len(PAIRS)


@pytest.mark.slow
def test_quiet_leaves_the_answer_and_nothing_else(vestige, workshop, monkeypatch):
    monkeypatch.setenv("VESTIGE_QUIET", "1")
    outcome = vestige(*index_words(), "--out", "new")
    assert outcome.err == ""
    assert outcome.out.startswith("new: complete\n")
