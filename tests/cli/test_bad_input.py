"""Bad input from the command line: a message that says what to do, status 2, no traceback, and nothing touched."""

import json
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cli.conftest import contents, index_words, spoil, tokens_only_in
from tests.workshop import write_rows

LONG_PROMPT = "Why is the sky blue? " * 60


def refused(outcome, *expected: str) -> None:
    """The outcome is a message of these words and status 2; an exception would have left the fixture by itself."""
    assert outcome.status == 2, outcome.err
    for words in expected:
        assert words in outcome.err
    assert "Traceback" not in outcome.err
    assert outcome.out == ""


PAIR = {"prompt": "Why?", "completion": "Because."}

BAD_DATA = {
    "empty file": ("", ("bad.jsonl holds no rows",)),
    "blank lines": ("\n\n", ("bad.jsonl holds no rows",)),
    "broken line": (json.dumps(PAIR) + '\n{"prompt": "Who\n', ("bad.jsonl, line 2: not valid JSON",)),
    "no object": ("[1, 2]\n", ("bad.jsonl", "line 1")),
    "missing field": (
        json.dumps(PAIR) + "\n" + json.dumps({"prompt": "Who?"}) + "\n",
        ("bad.jsonl, row 1 (line 2)", "It has `prompt` but no `completion`."),
    ),
    "unknown column": (json.dumps({"txt": "a b c"}) + "\n", ("bad.jsonl, row 0 (line 1)", "`txt`", "expected `text`")),
    "wrong type": (json.dumps({"text": 3}) + "\n", ("bad.jsonl, row 0 (line 1)", "`text`")),
    "prompt longer than the context": (
        json.dumps({"prompt": LONG_PROMPT, "completion": "Air."}) + "\n",
        ("are longer than 96 tokens", "None of the 1 examples of bad.jsonl has a token to learn"),
    ),
    "no target tokens": (
        json.dumps({"messages": [{"role": "user", "content": "Why?"}]}) + "\n",
        ("assistant",),
    ),
    "not UTF-8": ('{"text": "caf\udce9"}\n', ("bad.jsonl",)),
}


@pytest.mark.parametrize("case", BAD_DATA)
@pytest.mark.parametrize("out", ["new", "idx"])
def test_bad_training_data(case, out, vestige, idx):
    content, message = BAD_DATA[case]
    Path("bad.jsonl").write_bytes(content.encode("utf-8", "surrogateescape"))
    before = contents(idx)
    refused(vestige("index", "--model", "tiny-model", "--data", "bad.jsonl", "--out", out), *message)
    assert contents(idx) == before
    assert not Path("new").exists()


@pytest.mark.parametrize("case", ["empty file", "broken line", "unknown column", "not UTF-8"])
def test_bad_queries(case, vestige, idx):
    content, message = BAD_DATA[case]
    Path("bad.jsonl").write_bytes(content.encode("utf-8", "surrogateescape"))
    before = contents(idx)
    refused(vestige("attribute", "--index", "idx", "--queries", "bad.jsonl", "--out", "run"), *message)
    assert contents(idx) == before
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--data", "trian.jsonl"), "trian.jsonl: no such file. Did you mean train.jsonl?"),
        (("--data", "tiny-model/config.json"), "tiny-model/config.json"),
        (("--model", "nowhere"), "No model 'nowhere': there is no folder"),
        (("--model", "idx"), "idx is not a model folder"),
        (("--model", "train.jsonl"), "train.jsonl"),
        (("--components", "atention"), "Did you mean 'attention'?"),
        (("--compress", "lograa:16x16"), "Did you mean 'logra'?"),
        (("--compress", "mask:0"), "expected mask:K or mask:AxB"),
        (("--device", "gpu"), "is not a device"),
        (("--out", "train.jsonl"), "train.jsonl is a file, expected a folder"),
        (("--out", "tiny-model"), "--model tiny-model is the folder of --out, where results are replaced"),
        (("--out", "."), "--model tiny-model lies in the folder of --out"),
        (("--disk", "20GB"), "--disk belongs to --compress auto"),
        (("--compress", "auto", "--disk", "10B"), "Give a larger --disk"),
        (("--max-length", "1"), "at least 2 tokens are needed"),
    ],
)
def test_bad_settings(words, message, vestige, idx):
    before, data = contents(idx), Path("train.jsonl").read_bytes()
    # A flag that is given twice counts once, with its last value; the defaults here come first.
    given = {"--model": "tiny-model", "--data": "train.jsonl", "--out": "idx"} | dict(
        zip(words[::2], words[1::2], strict=True)
    )
    refused(vestige("index", *(word for pair in given.items() for word in pair)), message)
    assert contents(idx) == before
    assert Path("train.jsonl").read_bytes() == data


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (("--seed", "3"), ("seed", "0", "3")),
        (("--dtype", "float32"), ("dtype", "float16", "float32")),
        (("--compress", "logra:8x8"), ("tensorsketch:256", "logra:8x8")),
        (("--components", "mlp"), ("components",)),
        (("--loss", "mean"), ("loss", "sum", "mean")),
        (("--limit", "5"), ("12", "5")),
    ],
)
def test_changed_settings_over_an_old_index(words, shown, vestige, idx):
    before = contents(idx)
    refused(
        vestige(*index_words(), "--out", "idx", *words), "was made with other settings; nothing was changed", *shown
    )
    assert contents(idx) == before


def test_changed_data_over_an_old_index(vestige, idx):
    before = contents(idx)
    write_rows(Path("train.jsonl"), [PAIR, {"prompt": "Who?", "completion": "Me."}])
    refused(vestige(*index_words(), "--out", "idx"), "was made with other settings; nothing was changed")
    assert contents(idx) == before


@pytest.mark.slow
def test_an_example_whose_loss_is_not_a_number_is_named(vestige, idx):
    spoil(Path("tiny-model"), "model.embed_tokens.weight", rows=tokens_only_in("pair-9"))
    before = contents(idx)
    refused(vestige(*index_words(), "--out", "new"), '"pair-9" (row 9)', "NaN")
    refused(vestige(*index_words(), "--out", "idx"), "was made with other settings")
    assert contents(idx) == before
    assert not list(Path("new").glob("shards/*"))


def test_a_model_that_gives_no_numbers_at_all(vestige, idx):
    spoil(Path("tiny-model"), "model.norm.weight", rows=[0])
    before = contents(idx)
    refused(vestige(*index_words(), "--out", "new"), "pair-", "NaN")
    asked = vestige("attribute", "--index", "idx", "--model", "tiny-model", "--queries", "Why?", "--out", "run")
    refused(asked, "was made with another model")
    assert contents(idx) == before
    assert not list(Path("new").glob("shards/*"))
    assert not Path("run").exists()


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The operating system refuses to write more than `size` bytes to a file, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.slow
def test_a_disk_that_fills_up_while_indexing(vestige, idx):
    before = contents(idx)
    with files_of_at_most(20_000):
        refused(vestige(*index_words(), "--out", "new", "--dtype", "float32"), "disk")
    assert not [path for path in Path("new").rglob("*") if ".tmp." in path.name]
    assert contents(idx) == before
    # With room again, the same command goes on.
    assert vestige(*index_words(), "--out", "new", "--dtype", "float32").status == 0


def test_a_disk_that_fills_up_while_a_run_is_written(vestige, idx):
    before = contents(idx)
    with files_of_at_most(1_000):
        outcome = vestige("attribute", "--index", "idx", "--queries", "questions.jsonl", "--out", "run")
    # The answers were printed by then.
    assert outcome.status == 2
    assert "disk" in outcome.err
    assert "Traceback" not in outcome.err
    assert not Path("run").exists()
    assert contents(idx) == before


def test_a_disk_that_has_no_room_from_the_start(vestige, idx, monkeypatch):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    refused(vestige(*index_words(), "--out", "new"), "its disk has 1.0 MB free", "Free disk space")
    assert not Path("new").exists()


def test_an_index_that_is_not_there_or_not_finished(vestige, idx):
    words = ("--queries", "Why?", "--out", "run")
    refused(vestige("attribute", "--index", "nowhere", *words), "There is no index in nowhere", "vestige index")
    refused(vestige("attribute", "--index", "tiny-model", *words), "tiny-model")
    shutil.rmtree(idx / "shards")
    refused(vestige("attribute", "--index", "idx", *words), "idx")
    assert not Path("run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--method", "influense"), "influence"),
        (("--index", "idx", "--components", "mlp"), "fixed by the index"),
        (("--index", "idx", "--method", "bm25", "--tokens"), "--tokens"),
        (("--index", "idx", "--method", "grad-cos", "--self-influence"), "self-influence"),
        (("--index", "idx", "--answer", "given"), "answer"),
        (("--data", "train.jsonl"), "--model"),
    ],
)
def test_what_a_method_cannot_do(words, message, vestige, idx):
    if "--data" not in words and "--index" not in words:
        words = ("--index", "idx", *words)
    refused(vestige("attribute", "--queries", "Why is the sky blue?", "--out", "run", *words))
    assert message.lower() in vestige("attribute", "--queries", "Why?", "--out", "run", *words).err.lower()
    assert not Path("run").exists()


def test_a_run_that_is_there_is_not_replaced_unasked(vestige, idx):
    words = ("attribute", "--index", "idx", "--queries", "questions.jsonl", "--out", "run", "--method", "bm25")
    assert vestige(*words).status == 0
    before = contents(Path("run"))
    refused(vestige(*words), "run holds a run already; nothing was changed", "--overwrite")
    assert contents(Path("run")) == before
    assert vestige(*words, "--overwrite").status == 0


@pytest.mark.parametrize("verb", ["report", "view", "status"])
def test_a_folder_that_is_no_run(verb, vestige, workshop):
    refused(vestige(verb, "tiny-model"), "tiny-model")


def test_an_export_over_something_else(vestige, idx):
    before = contents(Path())
    refused(vestige("export", "idx", "--out", "idx"), "is the folder of --out, where results are replaced")
    refused(vestige("export", "tiny-model", "--out", "new"), "tiny-model")
    assert contents(Path()) == before
