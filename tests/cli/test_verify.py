"""`vestige status --verify`, and commands on results whose bytes are not what was written."""

import json
import re

import pytest

from vestige.errors import CorruptFile

INDEX = ("index", "--model", "tiny-model", "--data", "train.jsonl", "--compress", "logra:4x4", "--out", "idx")
ASK = ("attribute", "--index", "idx", "--queries", "questions.jsonl", "--dense", "--out")
AUDIT = ("audit", "--model", "tiny-model", "--data", "train.jsonl", "--measures", "loss", "--out", "seen")
SELECT = ("select", "--scores", "run", "--budget", "3", "--out", "chosen")
ALTERED = [
    ("idx", "shards/00000.safetensors"),
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


def refused(vestige, *words) -> str:
    """The message with which a command is refused, in words without line breaks."""
    try:
        outcome = vestige(*words)
    except CorruptFile as error:
        return " ".join(str(error).split())
    assert outcome.status == 2
    return " ".join(outcome.err.split())


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
    message = refused(vestige, "status", "--verify", folder)
    assert re.search(rf"1 of \d+ files of {folder} are not what was written: {file}", message)


@pytest.mark.slow
def test_altered_results_are_refused_by_the_commands_that_read_them(vestige, made):
    flip(made / "run" / "examples.parquet")
    for words in (("status", "run"), ("report", "run"), SELECT):
        assert "examples.parquet was altered" in refused(vestige, *words)
    flip(made / "seen" / "examples.parquet")
    for words in (("status", "seen"), ("report", "seen")):
        assert "examples.parquet was altered" in refused(vestige, *words)
    flip(made / "idx" / "shards" / "00000.safetensors")
    assert re.search(r"00000\.safetensors .*sha256", refused(vestige, *ASK, "other"))
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
