"""The ladder: candidates of cheap rankings, exact scores of these alone, and what each rung bought."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import vestige
from tests.workshop import PAIRS, furnish, write_rows
from vestige.cli import main
from vestige.evaluate import judge_ladder

QUESTIONS = [
    {"id": "sky", "prompt": PAIRS[0][0], "completion": PAIRS[0][1]},
    {"id": "rome", "prompt": PAIRS[3][0], "completion": PAIRS[3][1], "instead": "The capital of Italy is Paris."},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, an index of 48 rows of uneven lengths, and queries of which one is a contrast."""
    folder = furnish(tmp_path_factory.mktemp("ladder"))
    rows = [
        {"id": f"{name}-{number}", "prompt": f"{prompt} ({number})", "completion": f"{answer} " * (1 + number)}
        for number in range(4)
        for name, (prompt, answer, _) in enumerate(PAIRS)
    ]
    write_rows(folder / "rows.jsonl", rows)
    write_rows(folder / "asked.jsonl", QUESTIONS)
    vestige.index(model=folder / "tiny-model", data=folder / "rows.jsonl", out=folder / "idx")
    return folder


def climb(folder, out, **given):
    asked = {"index": folder / "idx", "queries": str(folder / "asked.jsonl"), "out": out, "trust": False}
    return vestige.attribute(**(asked | {"rerank": 5, "k": 4, "dense": True} | given))


@pytest.mark.parametrize("method", ["ekfac", "grad-dot"])
def test_the_first_rows_of_every_rung_have_their_exact_scores(folder, tmp_path, method):
    run = climb(folder, tmp_path / "run", rerank_method=method)
    whole = vestige.attribute(
        model=folder / "tiny-model",
        data=folder / "rows.jsonl",
        queries=str(folder / "asked.jsonl"),
        method=method,
        dense=True,
        trust=False,
        out=tmp_path / "whole",
    )
    ladder, scores, exact = run.run.ladder, run.dense(), whole.dense()
    scored = np.isfinite(scores[0])
    np.testing.assert_array_equal(np.flatnonzero(scored), ladder.candidates)
    assert 5 <= scored.sum() < 48
    np.testing.assert_allclose(scores[:, scored], exact[:, scored], rtol=1e-3, atol=1e-4 * np.abs(exact).max())
    assert np.isnan(scores[:, ~scored]).all(), "a row that is no candidate has no score"
    first = vestige.Scores.open(tmp_path / "run" / "first-rung")
    for query in run.queries:
        assert {row.row for row in first.top(query, 5)} <= set(ladder.candidates)
        listed = [row.row for row in run.top(query, 4)]
        order = np.argsort(-np.where(scored, exact[run.queries.index(query)], -np.inf))
        assert listed == order[:4].tolist()
        for standing in run.ladder(query, 4):
            ranks = dict(zip([rung.name for rung in ladder.rungs], standing.ranks, strict=True))
            places = [row.example_id for row in first.top(query, 5)]
            assert ranks["influence"] == (
                places.index(standing.example_id) + 1 if standing.example_id in places else None
            )
    assert [rung.rows for rung in ladder.rungs] == [48, 48, 48, len(ladder.candidates)]
    assert {rung.name for rung in ladder.rungs} == {"influence", "bm25", "verbatim", method}
    below = run.top(0, len(ladder.candidates) + 2)
    assert len(run.top(0, 4)) == 4
    assert "not scored" not in str(below)


def test_rows_below_the_candidates_keep_their_place_without_a_score(folder, tmp_path):
    run = climb(folder, tmp_path / "run", rerank=2, k=20, rerank_method="grad-dot")
    count = len(run.run.ladder.candidates)
    rows = run.top(0, count + 2)
    assert [row.rank for row in rows] == list(range(1, count + 3))
    assert all(np.isnan(row.score) and row.percentile is None for row in rows[count:])
    assert "not scored" in str(rows)
    assert all(row.percentile is None for row in rows), "a share of all rows is not known"


def test_the_terminal_shows_the_first_ranking_first_and_then_what_each_rung_took(folder, tmp_path, capsys):
    command = ["attribute", "--index", str(folder / "idx"), "--queries", str(folder / "asked.jsonl"), "--no-trust"]
    main([*command, "--rerank", "5", "--rerank-method", "grad-dot", "--out", str(tmp_path / "run")])
    out = capsys.readouterr().out
    assert out.index("proponents of query sky") < out.index("Ranks of query sky at each rung")
    assert "bm25: 48 examples in" in out
    assert "Scored exactly" in vestige.report(tmp_path / "run").read_text()
    main(["status", str(tmp_path / "run")])


def test_a_killed_ladder_goes_on_where_it_stopped(folder, tmp_path):
    whole = climb(folder, tmp_path / "whole", rerank_method="ekfac")
    command = [sys.executable, "-m", "vestige", "attribute", "--index", str(folder / "idx"), "--no-trust", "--dense"]
    command += ["--queries", str(folder / "asked.jsonl"), "--rerank", "5", "--k", "4", "--out", str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        next(line for line in process.stdout if "proponents of query" in line)
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "run" / "run.json").exists()
    began = time.time()
    run = climb(folder, tmp_path / "run", rerank_method="ekfac")
    created = json.loads((tmp_path / "run" / "first-rung" / "run.json").read_text())["created"]
    assert np.datetime64(created[:19]).astype("datetime64[s]").astype(int) <= began, "the first rung was not made again"
    np.testing.assert_allclose(run.dense(), whole.dense(), rtol=1e-4, equal_nan=True)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--rerank-method", "grad-dot"], "has no effect without --rerank"),
        (["--rerank", "5", "--rerank-method", "bm25"], "cannot score a few rows exactly"),
        (["--rerank", "5", "--rerank-method", "influence"], "cannot score a few rows exactly"),
        (["--rerank", "5", "--rerank-method", "replay"], "Type --training FOLDER"),
        (["--rerank", "5", "--workers", "2"], "drop --workers"),
        (["--rerank", "5", "--damping", "0.1,1"], "several --damping"),
    ],
)
def test_what_a_ladder_cannot_do_is_refused_before_any_work(folder, tmp_path, capsys, given, words):
    with pytest.raises(SystemExit) as ended:
        main(["attribute", "Why?", "--index", str(folder / "idx"), "--out", str(tmp_path / "run"), *given])
    assert ended.value.code == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_bank_says_what_each_rung_bought_and_replay_is_a_rung(folder, tmp_path):
    plain = write_rows(
        tmp_path / "plain.jsonl", [{k: v for k, v in row.items() if k != "instead"} for row in QUESTIONS]
    )
    learning = {"model": str(folder / "tiny-model"), "data": str(folder / "rows.jsonl"), "epochs": 1, "batch_size": 16}
    bank = vestige.bank(**learning, queries=str(plain), out=tmp_path / "bank", subsets=4, seeds=1, learning_rate=1e-3)
    run = climb(
        folder, tmp_path / "run", queries=str(plain), rerank_method="grad-dot", bank=tmp_path / "bank", dense=False
    )
    first, *_, last = run.run.ladder.rungs
    assert len(bank.query_ids) == 2
    for value in (first.lds, first.lds_of_all, last.lds):
        assert -1 <= value[0] <= 1
    assert judge_ladder(run.folder, tmp_path / "bank").rungs[-1].lds == last.lds
    vestige.train(**learning, out=tmp_path / "trained")
    replayed = climb(folder, tmp_path / "replayed", rerank_method="replay", training=tmp_path / "trained", options={})
    assert len(replayed.run.ladder.candidates) == 48
    assert np.isfinite(replayed.dense()).all()
