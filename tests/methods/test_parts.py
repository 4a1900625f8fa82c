"""The run is on disk with its ranking; everything else is added to it, and after a kill only what is missing."""

import json
import multiprocessing
import os
import signal
import sys

import pytest
import torch

import vestige
from tests.workshop import PAIRS, furnish, write_rows
from vestige.errors import IndexMismatch, UserError
from vestige.methods import METHODS, Method, attribute, method
from vestige.reports import report
from vestige.runs import Meaning, ScoreBlock, file_faults, read_record
from vestige.settings import AttributeSettings

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["vestige.methods", "pandas", "tests.workshop", "transformers.models.llama"])
PARTS = ["components", "tokens", "self_influence", "checks"]
VARYING = ("created", "seconds", "peak_memory_bytes", "command", "config", "files")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, 12 examples, two questions, and an index."""
    folder = furnish(tmp_path_factory.mktemp("parts"))
    torch.set_num_threads(1)
    write_rows(folder / "asked.jsonl", [{"prompt": "Who wrote Emma?", "completion": "Jane."}, {"prompt": "Bees?"}])
    vestige.index(model=str(folder / "tiny-model"), data=str(folder / "train.jsonl"), out=folder / "index")
    return folder


def settings_for(place, out, **changes):
    given = {"index": place / "index", "queries": str(place / "asked.jsonl"), "tokens": True, "self_influence": True}
    return AttributeSettings(**(given | {"out": out} | changes))


def ask(place, out, **changes):
    hooks = {name: changes.pop(name) for name in ("on_answers", "on_ranking") if name in changes}
    return attribute.run(settings_for(place, out, **changes), **hooks)


def content_of(run):
    """Every table's bytes, and the record without what differs from run to run."""
    record = json.loads((run / "run.json").read_text())
    kept = {name: value for name, value in record.items() if name not in VARYING}
    return kept | {path.name: path.read_bytes() for path in run.glob("*.parquet")}


def interrupt(_):
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def whole(place):
    ask(place, place / "whole")
    return content_of(place / "whole")


def test_answers_come_first_then_the_ranking_in_a_run_that_opens(place, tmp_path):
    events = []

    def on_ranking(scores):
        events.append("ranking")
        assert scores.run.missing == PARTS
        assert len(scores.top(1, 3)) == 3
        assert "Not there yet" in repr(scores)
        assert "--tokens" in repr(scores)  # the command that adds it
        with pytest.raises(UserError, match=r"Not there yet: .*scores of tokens"):
            scores.tokens(0, scores.top(0)[0].example_id)
        with pytest.raises(UserError, match="Not there yet"):
            scores.self_influence()
        assert "Not there yet" in report(scores.folder, tmp_path / "early.html").read_text()

    def on_answers(queries, generated):
        assert not (tmp_path / "run").exists()
        assert [query.lacks_answer for query in queries.examples] == [False, False]
        events.append(list(generated))

    scores = ask(place, tmp_path / "run", on_answers=on_answers, on_ranking=on_ranking)
    assert events == [[False, True], "ranking"]
    assert scores.run.missing == []
    assert "Not there yet" not in repr(scores)
    assert "Not there yet" not in report(scores.folder, tmp_path / "late.html").read_text()
    assert not any(file_faults(scores.folder, scores.run.files).values())
    assert {path.name for path in scores.folder.iterdir()} == {*scores.run.files, "run.json"}


def test_after_ctrl_c_the_same_command_adds_what_is_missing_alone(place, tmp_path, whole, capfd):
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        ask(place, out, on_ranking=interrupt)
    assert read_record(out).missing == PARTS
    before = {name: (out / name).stat().st_mtime_ns for name in ("scores.parquet", "examples.parquet")}
    capfd.readouterr()
    ask(place, out)
    said = capfd.readouterr().err
    assert "Scores of tokens" in said
    assert "Scoring" not in said
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before
    assert content_of(out) == whole
    with pytest.raises(IndexMismatch, match="holds a run already"):
        ask(place, out)


def ask_and_die(place, out, name, number):
    """Ask, and die by SIGKILL as a file is about to get this name for the `number`-th time."""
    seen = 0

    def watch(event, args):
        nonlocal seen
        if event == "os.rename" and str(args[1]).startswith(str(out)) and str(args[1]).endswith(name):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    ask(place, out)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "number", "left"),
    [
        ("components.parquet", 1, PARTS),
        ("run.json", 1, PARTS),  # the table of components is there, and not counted in
        ("tokens.parquet", 1, PARTS[1:]),
        ("self_influence.parquet", 1, PARTS[2:]),
        ("run.json", 4, PARTS[3:]),
    ],
)
def test_a_kill_in_any_part_leaves_a_run_that_opens_and_is_completed(place, tmp_path, whole, name, number, left):
    out = tmp_path / "run"
    child = PROCESSES.Process(target=ask_and_die, args=(place, out, name, number))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    scores = vestige.Scores.open(out)
    assert scores.run.missing == left
    assert scores.top(0)
    ask(place, out)
    assert content_of(out) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_token_scores_of_finished_queries_are_kept(place, tmp_path, whole, capfd):
    def die(event, args):
        if watching and event == "os.rename" and "scores-of-tokens/00001.json" in str(args[1]):
            raise KeyboardInterrupt

    watching, out = True, tmp_path / "run"
    sys.addaudithook(die)
    with pytest.raises(KeyboardInterrupt):
        ask(place, out)
    watching = False
    said = capfd.readouterr().err
    assert "Not there yet: scores of tokens, self-influence, trust checks" in said
    assert read_record(out).missing == PARTS[1:]
    ask(place, out)
    assert "1 of 2 pieces are already done" in capfd.readouterr().err
    assert content_of(out) == whole


def test_other_settings_and_other_inputs_are_refused_and_overwrite_begins_again(place, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        ask(place, out, tokens=False, on_ranking=interrupt)
    before = content_of(out)
    with pytest.raises(IndexMismatch, match=r"begun with other settings(.|\n)*k: 20 then, 3 now(.|\n)*--overwrite"):
        ask(place, out, tokens=False, k=3)
    questions = (place / "asked.jsonl").read_text()
    try:
        (place / "asked.jsonl").write_text(questions.replace("Jane", "Anne"))
        with pytest.raises(IndexMismatch, match="another than when it was begun"):
            ask(place, out, tokens=False)
    finally:
        (place / "asked.jsonl").write_text(questions)
    assert content_of(out) == before
    scores = ask(place, out, tokens=False, k=3, overwrite=True)
    assert (scores.run.missing, len(scores.top(0))) == ([], 3)


def test_a_sweep_of_dampings_is_completed_too(place, tmp_path):
    given = {"damping": (0.1, 1.0), "tokens": False}
    ask(place, tmp_path / "whole", **given)
    with pytest.raises(KeyboardInterrupt):
        ask(place, tmp_path / "run", **given, on_ranking=interrupt)
    assert vestige.Scores.open(tmp_path / "run" / "damping-0.1").run.missing == []
    ask(place, tmp_path / "run", **given)
    assert content_of(tmp_path / "run") == content_of(tmp_path / "whole")


def test_a_run_without_parts_is_complete_at_once(place, tmp_path):
    seen = []
    given = {"index": None, "data": place / "train.jsonl", "method": "bm25", "tokens": False, "self_influence": False}
    ask(place, tmp_path / "run", **given, trust=False, on_ranking=lambda scores: seen.append(scores.run.missing))
    assert seen == [[]]


MEANING = Meaning(*["of lengths"] * 7)


@pytest.fixture
def by_length(monkeypatch):
    """A method that runs the model and ranks by length, whatever the model says."""
    list(METHODS)  # a module registers when it is imported, which is once
    monkeypatch.setattr(METHODS, "_added", dict(METHODS._added))

    @method("by-length")
    class ByLength(Method):
        meaning = MEANING
        needs_model = True

        def blocks(self, job):
            lengths = torch.as_tensor(job.train.lengths).double()
            yield ScoreBlock(torch.arange(len(job.train)), lengths.repeat(len(job.queries), 1))

    return ByLength.name


def test_a_ranking_that_does_not_depend_on_the_model_fails_the_check(place, tmp_path, by_length):
    rows = [{"prompt": prompt, "completion": f"{answer} " * (1 + number % 3)} for number, (prompt, answer, _) in
            enumerate(PAIRS * 4)]  # fmt: skip
    write_rows(tmp_path / "long.jsonl", rows)
    given = {"index": None, "model": str(place / "tiny-model"), "data": str(tmp_path / "long.jsonl")}
    scores = ask(place, tmp_path / "run", **given, method=by_length, tokens=False, self_influence=False)
    check = scores.run.trust.checks[0]
    assert check.name == "randomised-model correlation"
    assert (check.value, check.verdict) == (pytest.approx(1.0), "warn")
    assert "10 of 48 examples and 2 of 2 queries" in check.reading


def test_what_the_check_needs_of_the_index_alone_is_kept_in_it(place, tmp_path, whole):
    kept = list((place / "index" / "checks").rglob("*"))
    shards = [path for path in kept if path.suffix == ".safetensors"]
    assert len(shards) == 1
    before = {path: path.stat().st_mtime_ns for path in kept if path.is_file()}
    scores = ask(place, tmp_path / "run", tokens=False, self_influence=False)
    assert scores.run.trust.checks[0].value == whole["trust"]["checks"][0]["value"]
    assert {
        path: path.stat().st_mtime_ns for path in (place / "index" / "checks").rglob("*") if path.is_file()
    } == before
    write_rows(tmp_path / "other.jsonl", [{"prompt": "What do bees make?", "completion": "Wax."}])
    ask(place, tmp_path / "other", queries=str(tmp_path / "other.jsonl"), tokens=False, self_influence=False)
    assert {path: path.stat().st_mtime_ns for path in before} == before
