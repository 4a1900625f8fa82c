"""`vestige status --verify`, and commands on results whose bytes are not what was written."""

import json

import pytest

from vestige.errors import CorruptFile

INDEX = ("index", "--model", "tiny-model", "--data", "train.jsonl", "--compress", "logra:4x4", "--out", "idx")
ASK = ("attribute", "--index", "idx", "--queries", "questions.jsonl", "--dense", "--out")
AUDIT = ("audit", "--model", "tiny-model", "--data", "train.jsonl", "--measures", "loss", "--out", "seen")
SELECT = ("select", "--scores", "run", "--data", "train.jsonl", "--count", "3", "--out", "chosen")
ALTERED = [
    ("idx", "shards/00001.safetensors"),
    ("run", "scores.parquet"),
    ("run", "scores.safetensors"),
    ("seen", "evidence.parquet"),
]


@pytest.fixture
def made(vestige, workshop):
    """An index, a run and an audit."""
    for words in (INDEX, (*ASK, "run"), AUDIT):
        assert vestige(*words).status == 0
    return workshop


def flip(path):
    body = bytearray(path.read_bytes())
    body[len(body) // 2] ^= 1
    path.write_bytes(body)


@pytest.mark.parametrize(("folder", "file"), ALTERED)
def test_every_file_is_listed_and_the_altered_one_named(vestige, made, folder, file):
    good = vestige("status", "--verify", folder)
    assert good.status == 0
    assert f"{file}: as written" in good.out
    assert "are as they were written" in good.out
    flip(made / folder / file)
    with pytest.raises(CorruptFile, match=rf"1 of .* files of {folder} are not what was written: {file}"):
        vestige("status", "--verify", folder)


def test_altered_results_are_refused_by_the_commands_that_read_them(vestige, made):
    flip(made / "run" / "examples.parquet")
    for words in (("status", "run"), ("report", "run"), SELECT):
        with pytest.raises(CorruptFile, match=r"examples\.parquet was altered"):
            vestige(*words)
    flip(made / "seen" / "examples.parquet")
    for words in (("status", "seen"), ("report", "seen")):
        with pytest.raises(CorruptFile, match=r"examples\.parquet was altered"):
            vestige(*words)
    flip(made / "idx" / "shards" / "00000.safetensors")
    with pytest.raises(CorruptFile, match=r"00000\.safetensors .*sha256"):
        vestige(*ASK, "other")
    # The way out that the message names.
    assert vestige(*INDEX).status == 0
    assert vestige("status", "--verify", "idx").status == 0


def test_a_run_without_digests_opens_as_before(vestige, made):
    path = made / "run" / "run.json"
    known = json.loads(path.read_text())
    del known["files"]
    path.write_text(json.dumps(known))
    assert vestige("status", "run").status == 0
    assert "no sha256 is kept of it" in vestige("status", "--verify", "run").out
