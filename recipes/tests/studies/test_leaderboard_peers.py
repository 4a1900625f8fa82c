"""Rows of the leaderboard that other packages compute: what their scripts leave is a row, or a reason."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from vestige import attribute
from vestige.errors import SpecError
from vestige_recipes import study
from vestige_recipes.common.texts import byte_gpt, help_topics, write_rows
from vestige_recipes.leaderboard.peer_rows import ask_peer, find_peers

EXAMPLES, QUERIES = 20, 3
HEAD = """
import json, sys
from pathlib import Path
import numpy as np
model, train, queries, out = sys.argv[1:]
train, queries = ([json.loads(line)["input_ids"] for line in Path(each).read_text().splitlines()]
                  for each in (train, queries))
print("calls", file=open(Path(out).with_name("calls"), "a"))
def leave(name, **content):
    np.savez(Path(out, name + ".npz"), seconds=1.5, memory=7, **content)
scores = np.array([[sum(a == b for a, b in zip(query, row)) for row in train] for query in queries], float)
"""
REASONS = {
    "leave('a', scores=scores[:-1])": "(6, 20), where (7, 20)",
    "leave('a', scores=scores * np.nan)": "not all finite",
    "leave('a', scores=-scores)": "another order, or sign",
    "leave('a', scores=np.roll(scores, 1, axis=1))": "another order, or sign",
    "leave('a')": "no scores, seconds and memory",
    "Path(out, 'a.npz').write_text('x')": "no scores, seconds and memory",
    "leave('a', reason='it has no such layer')": "it has no such layer",
    "raise ImportError('no such package')": "exit status 1: ImportError: no such package",
    "pass": "left no rows",
}


@pytest.fixture
def texts(tmp_path):
    made = help_topics(0, length=16, subjects=2, sequences=EXAMPLES, queries=4, before=1)
    train, queries = (tmp_path / f"{name}.jsonl" for name in ("train", "queries"))
    return write_rows(train, made.train), write_rows(queries, made.queries[:QUERIES])


def ask(tmp_path, texts, code, head=HEAD):
    script = tmp_path / "mine.py"
    script.write_text(head + code)
    (peer,) = find_peers({str(script): sys.executable})
    return ask_peer(peer, tmp_path / "peers", "model", *texts)


def test_a_script_leaves_rows_for_the_queries_alone_and_is_not_run_again(tmp_path, texts):
    for _ in range(2):
        rows, reasons = ask(tmp_path, texts, "leave('one', scores=scores); leave('two', scores=2 * scores)")
        assert [(row.name, row.seconds, row.memory) for row in rows] == [("mine one", 1.5, 7), ("mine two", 1.5, 7)]
        train, queries = ([json.loads(line)["input_ids"] for line in path.read_text().splitlines()] for path in texts)
        same = [[sum(map(int.__eq__, query, row)) for row in train] for query in queries]
        assert np.array_equal(rows[0].scores, same)
        assert not reasons
    assert (tmp_path / "peers" / "calls").read_text() == "calls\n"


@pytest.mark.parametrize(("code", "reason"), REASONS.items())
def test_what_cannot_be_right_is_a_reason(tmp_path, texts, code, reason):
    rows, reasons = ask(tmp_path, texts, code)
    assert not rows
    assert reason in " ".join(reasons.values())


def test_a_script_that_was_changed_leaves_rows_of_its_own(tmp_path, texts):
    for name in ("one", "two"):
        rows, _ = ask(tmp_path, texts, f"leave({name!r}, scores=scores)")
        assert [row.name for row in rows] == [f"mine {name}"]


def test_a_file_that_is_no_program_is_a_reason(tmp_path, texts):
    (tmp_path / "mine.py").write_text(HEAD)
    (tmp_path / "python").write_bytes(b"\x7fELF")
    (tmp_path / "python").chmod(0o755)
    (peer,) = find_peers({str(tmp_path / "mine.py"): str(tmp_path / "python")})
    rows, reasons = ask_peer(peer, tmp_path / "peers", "model", *texts)
    assert (rows, "cannot be run" in reasons["mine"]) == ([], True)


def test_a_failed_script_is_run_again_and_what_it_left_stays(tmp_path, texts):
    for _ in range(2):
        rows, reasons = ask(tmp_path, texts, "leave('one', scores=scores); sys.exit(3)")
        assert [row.name for row in rows] == ["mine one"]
        assert "exit status 3" in reasons["mine"]
    assert (tmp_path / "peers" / "calls").read_text() == "calls\n" * 2


@pytest.mark.parametrize(
    ("given", "words"),
    [({"bergsom": sys.executable}, "bergson, dattri"), ({"dattri": "no/python"}, "environment that has dattri")],
)
def test_a_peer_that_is_not_there_is_refused_before_any_training(tmp_path, given, words):
    with pytest.raises(SpecError, match=words):
        study("leaderboard", size="tiny", out=tmp_path / "board", peer=given)
    assert [path.name for path in (tmp_path / "board").iterdir()] == ["study.json"]
    with pytest.raises(SpecError, match="leaderboard"):
        study("digits", size="tiny", out=tmp_path / "digits", peer={"bergson": sys.executable})


INSTALLED = dict(pair.split("=") for pair in os.environ.get("VESTIGE_PEERS", "").split())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bergson", "dattri", "kronfluence"])
def test_a_peer_scores_as_its_counterpart_does(tmp_path, texts, name, monkeypatch):
    if name not in INSTALLED:
        pytest.skip(f"needs an environment with {name}: VESTIGE_PEERS='{name}=PYTHON ...'")
    byte_gpt(16, 16, 2).save_pretrained(tmp_path / "model")
    (peer,) = find_peers({name: INSTALLED[name]})
    monkeypatch.chdir(tmp_path)
    rows, reasons = ask_peer(peer, Path("peers"), "model", *texts)
    found = {row.name.split()[1]: row.scores for row in rows}
    assert len(rows) + len(reasons) == len(list((tmp_path / "peers").glob("*/*.npz")))
    # Its DataInf, averaged over the rows, is all but their inner products; the others draw labels of their own.
    theirs, method, least = ("datainf", "grad-dot", 0.95) if name == "dattri" else ("ekfac", "ekfac", 0.5)
    common = {"model": str(tmp_path / "model"), "data": str(texts[0]), "queries": str(texts[1]), "trust": False}
    ours = attribute(**common, method=method, out=tmp_path / "run", dense=True).dense()
    assert np.mean([spearmanr(*pair).statistic for pair in zip(found[theirs], ours, strict=True)]) > least
