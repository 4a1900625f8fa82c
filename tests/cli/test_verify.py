"""`vestige status --verify`, and commands on results whose bytes are not what was written."""

import json

import pytest

from vestige.errors import CorruptFile


@pytest.fixture
def made(vestige, workshop):
    """An index, a run and an audit."""
    index = ("index", "--model", "tiny-model", "--data", "train.jsonl", "--compress", "logra:4x4", "--out", "idx")
    assert vestige(*index).status == 0
    assert vestige("attribute", "--index", "idx", "--queries", "questions.jsonl", "--dense", "--out", "run").status == 0
    audit = ("audit", "--model", "tiny-model", "--data", "train.jsonl", "--measures", "loss", "--out", "seen")
    assert vestige(*audit).status == 0
    return workshop


def flip(path):
    body = bytearray(path.read_bytes())
    body[len(body) // 2] ^= 1
    path.write_bytes(body)


@pytest.mark.parametrize(
    ("folder", "file"),
    [
        ("idx", "shards/00001.safetensors"),
        ("run", "scores.parquet"),
        ("run", "scores.safetensors"),
        ("seen", "evidence.parquet"),
    ],
)
def test_every_file_is_listed_and_the_altered_one_named(vestige, made, folder, file):
    good = vestige("status", "--verify", folder)
    assert good.status == 0
    assert f"{file}: as written" in good.out
    assert "are as they were written" in good.out
    flip(made / folder / file)
    with pytest.raises(CorruptFile, match=f"1 of .* files of {folder} are not what was written: {file}"):
        vestige("status", "--verify", folder)


def test_altered_results_are_refused_by_the_commands_that_read_them(vestige, made):
    flip(made / "run" / "examples.parquet")
    for words in (
        ("status", "run"),
        ("report", "run"),
        ("select", "--scores", "run", "--data", "train.jsonl", "--count", "3", "--out", "chosen"),
    ):
        with pytest.raises(CorruptFile, match=r"examples\.parquet was altered"):
            vestige(*words)
    flip(made / "idx" / "shards" / "00000.safetensors")
    with pytest.raises(CorruptFile, match=r"00000\.safetensors .*sha256"):
        vestige("attribute", "--index", "idx", "--queries", "questions.jsonl", "--out", "other")
    # The way out that the message names.
    assert (
        vestige(
            "index", "--model", "tiny-model", "--data", "train.jsonl", "--compress", "logra:4x4", "--out", "idx"
        ).status
        == 0
    )
    assert vestige("status", "--verify", "idx").status == 0
    flip(made / "seen" / "examples.parquet")
    for words in (("status", "seen"), ("report", "seen")):
        with pytest.raises(CorruptFile, match=r"examples\.parquet was altered"):
            vestige(*words)


def test_a_run_without_digests_opens_as_before(vestige, made):
    path = made / "run" / "run.json"
    known = json.loads(path.read_text())
    del known["files"]
    path.write_text(json.dumps(known))
    assert vestige("status", "run").status == 0
    assert "no sha256 is kept of it" in vestige("status", "--verify", "run").out
