"""What files, settings and terminals can do to a command: it is answered in words, with status 2."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.workshop import PAIRS, write_rows

DEEP = "[" * 100_000 + "]" * 100_000
HUGE = "9" * 5000
ROW = json.dumps({"prompt": "Why?", "completion": "Because."}) + "\n"
HOSTILE = "\x1b[31mred\x1b]0;title\x07\x9b2J\r\u202eevil"
"""Colours, the title of the window, an erased screen, a carriage return, and letters from right to left."""


def refused(outcome, *expected: str) -> None:
    assert outcome.status == 2, outcome.err
    for words in expected:
        assert words in outcome.err
    assert "bug in Vestige" not in outcome.err


DATA = {
    "deep.jsonl": (f'{ROW}{{"text": {DEEP}}}\n', "deep.jsonl, line 2: not valid JSON: nested more than 50 levels"),
    "deep.json": (DEEP, "deep.json, line 1: not valid JSON: nested more than 50 levels"),
    "deeper.jsonl": (f'{{"text": "a", "x": {"[" * 51}{"]" * 51}}}\n', "deeper.jsonl, line 1: not valid JSON: nested"),
    "digits.jsonl": (f'{{"text": "a", "n": {HUGE}}}\n', "a whole number of more than 4,300 digits"),
    "digits.json": (f'[{{"text": "a", "n": {HUGE}}}]', "a whole number of more than 4,300 digits"),
    "cell.jsonl": (json.dumps({"messages": DEEP}), "`messages` is a string, but not JSON: nested more than"),
    "utf16.jsonl": (ROW.encode("utf-16"), "iconv -f utf-16 -t utf-8 utf16.jsonl"),
    "utf32.csv": ("text\na\n".encode("utf-32"), "iconv -f utf-32 -t utf-8 utf32.csv"),
    "latin.csv": ("text\ncafé\n".encode("latin1"), "iconv -f latin1 -t utf-8 latin.csv"),
    "quotes.tsv.gz": (gzip.compress(b'text\n"a\n'), "not valid TSV"),
    "torn.csv.gz": (gzip.compress(b"text\na\n")[:-9], "cannot be read"),
    "torn.parquet": (b"PAR1PAR1", "not a Parquet file that can be read"),
}


@pytest.mark.parametrize("verb", ["index", "attribute", "train", "split"])
@pytest.mark.parametrize("name", DATA)
def test_a_broken_file_is_answered_by_every_reader(verb, name, vestige, idx):
    content, message = DATA[name]
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    commands = {
        "index": ("index", "--model", "tiny-model", "--data", name),
        "attribute": ("attribute", "--index", "idx", "--queries", name),
        "train": ("train", "--model", "tiny-model", "--data", name),
        "split": ("data", "split", "--data", name),
    }
    refused(vestige(*commands[verb], "--out", "new"), message)


TOO_LARGE = "9" * 22
SETTINGS = [
    (("--limit", TOO_LARGE), "a whole number of at most 9,223,372,036,854,775,807"),
    (("--seed", TOO_LARGE), "a whole number of at most"),
    (("--max-length", TOO_LARGE), "a whole number of at most"),
    (("--disk", "9" * 400 + "GB", "--compress", "auto"), "larger than any disk"),
    (("--disk", "1e999", "--compress", "auto"), "is not a size"),
    (("--device", "meta"), "PyTorch cannot compute there"),
    (("--device", "xla"), "PyTorch cannot compute there"),
    (("--out", ""), "--out is empty"),
    (("--out", "/"), "a file or folder with a name of its own"),
    (("--out", "x" * 300), "a shorter name"),
    (("--out", "a" + "/b" * 2500), "a shorter name"),
    (("--out", "a\0b"), "without the character NUL"),
    (("--out", "caf\udce9"), "a text in UTF-8"),
    (("--data", ""), "--data is empty"),
    (("--data", "\ud800"), "a text in UTF-8"),
    (("--model", "a\0b"), "without the character NUL"),
    (("--setup", "module load cuda"), "--setup has no effect without --engine slurm"),
    (("--no-wait",), "--wait has no effect without --engine slurm"),
]


@pytest.mark.parametrize(("words", "message"), SETTINGS)
def test_a_setting_beyond_all_bounds_or_without_effect_is_refused(words, message, vestige, workshop):
    own = [word for word in words if word.startswith("--")]
    given = {"--model": "tiny-model", "--data": "train.jsonl", "--out": "new"}
    basics = [word for name, value in given.items() if name not in own for word in (name, value)]
    refused(vestige("index", *basics, *words), message)
    assert not Path("new").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--epochs", "inf"), "expected a finite number"),
        (("--epochs", "nan"), "expected a finite number"),
        (("--epochs", "1e300"), "more than 10,000 checkpoints"),
        (("--learning-rate", "1e999"), "expected a finite number"),
        (("--checkpoints", "0,1e-9,...,1"), "more than 10,000 checkpoints"),
        (("--checkpoints", "0,1e-320,...,1"), "more than 10,000 checkpoints"),
        (("--checkpoints", "nan"), "expected numbers of epochs"),
    ],
)
def test_a_training_without_end_is_refused_at_once(words, message, vestige, workshop):
    refused(vestige("train", "--model", "tiny-model", "--data", "train.jsonl", "--out", "new", *words), message)


CONFIGS = {
    "number": ("model: 5\n", "`model` was 5, expected a name or a path"),
    "list": ("model: [a, b]\n", "expected one folder, file or hub id"),
    "mapping": ("model: {a: 1}\n", "expected one folder, file or hub id"),
    "deep": (f"model: {DEEP}\n", "nested more than 50 levels deep"),
    "cycle": ("model: &a [*a]\n", "nested more than 50 levels deep"),
    "date": ("model: 2020-01-01\n", "No model '2020-01-01'"),
    "key": ("model: m\n1: 2\n", "the key 1 is no text"),
    "twice": ("model: m\nmodel: n\n", "`model` is there twice"),
    "tag": ("model: !!timestamp x\n", "does not read as what its tag names"),
    "code": ("model: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
    "not finite": ("model: m\nseed: .nan\n", "expected a finite number"),
    "encoding": ("model: m\n".encode("utf-16"), "is neither YAML nor JSON"),
    "NUL": ('model: "a\\0b"\n', "without the character NUL"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CONFIGS)
def test_an_odd_config_is_refused(case, vestige, workshop):
    content, message = CONFIGS[case]
    Path("c.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(vestige("index", "--data", "train.jsonl", "--out", "new", "--config", "c.yaml"), message)


@pytest.mark.parametrize("verb", ["status", "report", "view", "cancel"])
@pytest.mark.parametrize("path", ["", "/", "x" * 300, "a\0b"])
def test_a_path_that_no_file_can_have(verb, path, vestige, workshop):
    refused(vestige(verb, path), "expected" if path else "is empty")


@pytest.mark.parametrize("name", ["questions.jsonl", "questions.jsonl ", "nowhere.txt", "some/where", "nowhere.jsonl"])
@pytest.mark.parametrize("verb", ["attribute", "untrac", "bank", "candidates"])
def test_a_file_name_is_no_question(verb, name, vestige, workshop):
    model = ("--model", "tiny-model", "--data", "train.jsonl", "--out", "new")
    commands = {
        "attribute": ("attribute", *model),
        "untrac": ("untrac", *model),
        "bank": ("bank", *model, "--steps", "1"),
        "candidates": ("data", "candidates", *model[2:]),
    }
    several = ("Why?", name) if verb in ("attribute", "untrac") else (name,)
    outcome = vestige(*commands[verb], "--queries", *several)
    if name == "questions.jsonl" and len(several) == 1:
        return  # then it is the file
    refused(outcome, name.strip())
    assert not Path("new").exists() or not any(Path("new").iterdir())


@pytest.mark.slow
def test_what_matches_nothing_is_refused(vestige, workshop):
    audit = ("audit", "--model", "tiny-model", "--data", "train.jsonl", "--measures", "loss", "--out", "new")
    for flag in ("source=", "source=nowhere"):
        refused(vestige(*audit, "--flag", flag), "marks no example of the data", "biology, books, physics, places")
    refused(vestige(*audit, "--holdout", "nowhere"), "nowhere")
    candidates = ("data", "candidates", "--data", "train.jsonl", "--queries", "questions.jsonl", "--out", "new")
    refused(vestige(*candidates, "--truth", "nope"), "--truth nope: no query has this column")
    refused(vestige("data", "split", "--data", "nowhere", "--out", "new"), "nowhere")


@pytest.mark.slow
def test_texts_of_others_are_escaped_wherever_they_are_printed(vestige, workshop):
    rows = [
        {"id": f"{HOSTILE}-{row}", "prompt": p, "completion": HOSTILE, "source": HOSTILE + s}
        for row, (p, _, s) in enumerate(PAIRS)
    ]
    write_rows(Path("train.jsonl"), rows)
    run = ("attribute", "--model", "tiny-model", "--data", "train.jsonl", "--queries", HOSTILE + " why?")
    audit = ("audit", "--model", "tiny-model", "--data", "train.jsonl", "--measures", "loss", "--verbose")
    unlearn = ("untrac", "--model", "tiny-model", "--data", "train.jsonl", "--queries", "train.jsonl", "--steps", "1")
    commands = [
        (*run, "--method", "bm25", "--dense", "--out", "run"),
        ("status", "run"),
        ("select", "--scores", "run", "--budget", "3", "--out", "chosen"),
        (*audit, "--out", "audit"),
        (*unlearn, "--out", "un"),
        ("report", HOSTILE),
    ]
    for words in commands:
        outcome = vestige(*words)
        assert outcome.status == (2 if words[0] == "report" else 0), outcome.err
        # With --verbose the libraries show bars of their own on the error output.
        printed = outcome.out if "--verbose" in words else outcome.out + outcome.err
        assert set(printed) & set("\x1b\x07\x9b\r\u202e") == set(), words
        assert "\\x1b[31mred" in printed


def test_ids_of_any_length_do_not_widen_the_table(vestige, workshop):
    rows = [{"id": str(row) * 100_000, "text": f"{p} {c}"} for row, (p, c, _) in enumerate(PAIRS)]
    write_rows(Path("train.jsonl"), rows)
    words = ("--data", "train.jsonl", "--queries", "Why?", "--method", "bm25", "--out", "run")
    assert max(map(len, vestige("attribute", *words).out.splitlines())) < 200


def test_ids_that_look_like_markup_are_printed_as_they_are(vestige, workshop):
    rows = [{"id": f"[/b][red]{row}", "text": f"{p} {c}"} for row, (p, c, _) in enumerate(PAIRS)]
    write_rows(Path("train.jsonl"), rows)
    outcome = vestige("select", "--data", "train.jsonl", "--strategy", "random", "--budget", "3", "--out", "chosen")
    assert outcome.status == 0
    assert "[/b][red]" in outcome.out


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """What a shell makes of a line in which `vestige` is this one."""
    command = f'vestige() {{ {sys.executable} -m vestige.cli "$@"; }}; {line}'
    known = os.environ | {"HF_HUB_OFFLINE": "1"} | environment
    return subprocess.run(["bash", "-c", command], capture_output=True, env=known, check=False)


ASK = "vestige attribute --data train.jsonl --queries 'Why? é 🙂' --method bm25 --out run"


@pytest.mark.slow
def test_a_terminal_of_few_letters(workshop):
    done = shell(ASK, PYTHONIOENCODING="ascii", LC_ALL="C")
    assert (done.returncode, b"Traceback" in done.stderr) == (0, False)
    assert b"\\xe9" in done.stdout


@pytest.mark.slow
def test_a_pipe_that_nobody_reads_any_more(workshop):
    done = shell(f"{ASK} | true; echo ${{PIPESTATUS[0]}}")
    assert done.stdout.strip() in (b"0", b"141")
    assert b"Traceback" not in done.stderr
    assert b"BrokenPipe" not in done.stderr
    assert Path("run/run.json").exists()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_output_that_cannot_be_written(workshop):
    done = shell(f"{ASK} > /dev/full")
    assert done.returncode == 2
    assert b"What was to be printed could not be written" in done.stderr
    # The answers are printed first, so nothing was scored; with room the same command does it all.
    assert not Path("run").exists()
    assert shell(f"{ASK} > /dev/null").returncode == 0


@pytest.mark.slow
def test_closed_streams(workshop):
    assert shell(f"{ASK} >&- 2>&-").returncode == 0
    assert Path("run/run.json").exists()
