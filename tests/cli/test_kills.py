"""Every command that writes is killed at random moments: the same command then ends as if nothing had happened.

A moment is a file operation of the command, counted in an undisturbed run; `VESTIGE_KILLS` is how many tries are made.
"""

import contextlib
import hashlib
import importlib
import io
import json
import os
import random
import re
import shutil
import signal
import sys
from pathlib import Path

import pyarrow.parquet as parquet
import pytest

from tests.workshop import PAIRS, furnish, write_rows
from vestige.cli import main
from vestige.registry import COMMANDS as REGISTERED

TRIES = int(os.environ.get("VESTIGE_KILLS", "15"))
MODEL, DATA, QUERIES = ("--model", "tiny-model"), ("--data", "train.jsonl"), ("--queries", "asked.jsonl")
MADE = {
    "idx": ("index", *MODEL, *DATA, "--compress", "logra:2x2"),
    "run": ("attribute", "--index", "idx", *QUERIES, "--dense"),
    "made-bank": ("bank", *MODEL, *DATA, *QUERIES, "--subsets", "3", "--seeds", "1", "--steps", "1"),
}
COMMANDS = {
    "index": ("index", *MODEL, *DATA, "--compress", "logra:2x2"),
    "workers": ("index", *MODEL, *DATA, "--compress", "logra:2x2", "--workers", "2"),
    "precondition": ("precondition", "idx"),
    "attribute": ("attribute", *MODEL, *DATA, *QUERIES, "--damping", "0.1,1", "--profile"),
    "replaced": ("attribute", "--index", "idx", *QUERIES, "--overwrite"),
    "audit": ("audit", *MODEL, *DATA, "--measures", "loss", "min_k"),
    "train": ("train", *MODEL, *DATA, "--epochs", "1", "--checkpoints", "0,1", "--alarm", "--alarm-measure", "loss"),
    "bank": ("bank", *MODEL, *DATA, *QUERIES, "--subsets", "2", "--seeds", "1", "--steps", "1", "--keep-weights"),
    "untrac": ("untrac", *MODEL, *DATA, *QUERIES, "--steps", "1", "--learning-rate", "0.01"),
    "select": ("select", "--scores", "run", *DATA, "--budget", "5"),
    "lds": ("evaluate", "lds", "--run", "run", "--bank", "made-bank", "--draws", "20"),
    "sweep": ("sweep", "grid.yaml"),
    "split": ("data", "split", *DATA, "--seed", "1"),
    "paraphrase": ("data", "paraphrase", "--rules", *DATA),
    "tokenize": ("data", "tokenize", *DATA, "--tokenizer", "tiny-model"),
    "export": ("export", "idx", "--to", "datasets"),
    "report": ("report", "run"),
}
# Commands of the recipes are killed too, where the recipes are installed.
COMMANDS = {
    name: words for name, words in COMMANDS.items() if {words[0], " ".join(words[:2])} & set(REGISTERED.names())
}
GRID = """
verb: attribute
base: {index: idx, queries: asked.jsonl}
axes: {method: [grad-dot, bm25]}
"""
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
_CHANGES = ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.link", "shutil.rmtree", "os.truncate")
_VARYING = re.compile(
    "seconds|memory|created|command|begun|ended|when|rate|bytes_a_second|^_fingerprint$|profile.json|run.json"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    for module in ("measures", "banks", "evaluate", "indexes", "methods", "prepare", "training"):
        # What is imported here, no child has to.
        importlib.import_module(f"vestige.{module}")
    folder = furnish(tmp_path_factory.mktemp("kills"))
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion, _ in PAIRS[:2]]
    write_rows(folder / "asked.jsonl", rows)
    (folder / "grid.yaml").write_text(GRID)
    for name, words in MADE.items():
        code, said, _ = _run(folder, (*words, "--out", name))
        assert code == 0, said
    return folder


def _run(place, words, step=-1, number=0):
    """A command in a process of its own, which sends itself a signal before its `step`-th change of a file.

    Returns:
        Its exit status, what it printed, and how many changes it made.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        os._exit(_in_child(place, words, step, number, write))
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    text, counted, count = said.rpartition("\ncount ")
    return os.waitstatus_to_exitcode(status), text if counted else said, int(count) if counted else 0


def _in_child(place, words, step, number, write):
    os.chdir(place)
    os.environ["VESTIGE_QUIET"] = "1"
    os.environ["OMP_NUM_THREADS"] = "1"
    os.dup2(write, 1)
    os.dup2(write, 2)
    sys.stdout, sys.stderr = (io.TextIOWrapper(os.fdopen(os.dup(write), "wb"), write_through=True) for _ in "oe")
    for each in SIGNALS[1:]:
        signal.signal(each, signal.default_int_handler if each == signal.SIGINT else signal.SIG_DFL)
    seen, pid = 0, os.getpid()

    def watch(event, args):
        nonlocal seen
        writes = event == "open" and isinstance(args[0], str) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if os.getpid() != pid or not (writes or event in _CHANGES) or str(args[0]).startswith(("/dev", "/proc")):
            return
        seen += 1
        if seen == step:
            os.kill(pid, number)

    sys.addaudithook(watch)
    try:
        main(words)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    with contextlib.suppress(OSError):
        print(f"\ncount {seen}", file=sys.stderr, flush=True)
    return code


def _content(path):
    """What a file says, but for times and memory."""
    if path.suffix == ".parquet":
        table = parquet.read_table(path)
        return str(table.select([name for name in table.column_names if not _VARYING.search(name)]).to_pydict())
    if path.suffix in (".json", ".jsonl"):
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        return json.dumps([_without_times(json.loads(line)) for line in lines], sort_keys=True)
    if path.suffix == ".html":
        return str(len(path.read_bytes()) > 1000)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _without_times(value):
    if isinstance(value, dict):
        return {name: _without_times(each) for name, each in value.items() if not _VARYING.search(name)}
    return [_without_times(each) for each in value] if isinstance(value, list) else value


def _result(folder):
    """Every file of a result, by its path, but for what jobs note of themselves and when."""
    if folder.is_file():
        return {folder.suffix: _content(folder)}
    own = folder.name
    files = [path for path in folder.rglob("*") if path.is_file() and "named" not in path.relative_to(folder).parts]
    told = {"launch", "log.txt", "profile.json", "done.json", "training_args.bin"}
    return {
        str(path.relative_to(folder)): _content(path).replace(own, "OUT")
        for path in files
        if not told & set(path.relative_to(folder).parts)
    }


def _listing(place):
    return {str(path.relative_to(place)): path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()}


def _strays(place, out):
    beside = [path.name for path in place.iterdir() if path.name.startswith(f".{out.name}")]
    inside = [str(path) for path in out.rglob("*")] if out.is_dir() else []
    return beside + [path for path in inside if re.search(r"\.tmp\.|\.part$|\.lock$|\.replaced$|\.writing$", path)]


@pytest.fixture(scope="module")
def references(place):
    found = {}
    for name, words in COMMANDS.items():
        out = place / f"reference-{name}{'.html' if name == 'report' else ''}"
        if name == "replaced":
            shutil.copytree(place / "run", out)
        code, said, count = _run(place, (*words, "--out", out.name))
        assert code == 0, said
        found[name] = (count, _result(out))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("number", range(TRIES))
def test_a_command_that_was_killed_ends_as_if_it_had_not_been(place, references, number):
    draw = random.Random(number)
    name = list(COMMANDS)[number % len(COMMANDS)]
    count, wanted = references[name]
    out = place / f"try-{number}{'.html' if name == 'report' else ''}"
    words = (*COMMANDS[name], "--out", out.name)
    if name == "replaced":
        shutil.copytree(place / "run", out)
    (place / "thesis.txt").write_text("mine")
    before = _listing(place)
    killed = []
    for _ in range(draw.choice((1, 2))):
        step, each = draw.randint(1, count), draw.choice(SIGNALS)
        code, said, _ = _run(place, words, step, each)
        assert "Traceback" not in said, (name, step, each, said)
        killed.append(f"{each.name} before change {step} of {count}: status {code}")
    code, said, _ = _run(place, words)
    print(f"{name}: {'; '.join(killed)}; then status {code}")
    assert code == 0 or "holds a run already" in said or "is not an empty folder" in said, (name, killed, said)
    assert _strays(place, out) == [], (name, killed)
    found = _result(out)
    assert [path for path in {**found, **wanted} if found.get(path) != wanted.get(path)] == [], (name, killed)
    after = _listing(place)
    # An index keeps the curvature that was measured of it, and notes who measured.
    kept = [path for path in before if not path.startswith((f"{out.name}/", "idx/launch/", "idx/curvature/"))]
    assert {path: after.get(path) for path in kept} == {path: before[path] for path in kept}, (name, killed)
    shutil.rmtree(out) if out.is_dir() else Path(out).unlink()
