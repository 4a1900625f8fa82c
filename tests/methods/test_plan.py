"""Scores in pieces: the same bytes whoever computed them, however often he was killed."""

import json
import multiprocessing
import os
import signal
import sys

import pytest

import vestige
from tests.workshop import PAIRS, furnish, write_rows
from vestige.errors import WorkElsewhere
from vestige.jobs import PieceFiles
from vestige.methods import ExactGradients, IndexedGradients

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["vestige.methods", "pandas", "tests.workshop", "transformers.models.llama"])

TABLES = ("scores.parquet", "self_influence.parquet", "components.parquet", "examples.parquet")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, 48 examples, two questions with answers, and an index of many shards."""
    folder = furnish(tmp_path_factory.mktemp("plan"))
    rows = [
        {"id": f"{turn}-{number}", "prompt": prompt, "completion": f"{completion} {turn}"}
        for turn in range(4)
        for number, (prompt, completion, _) in enumerate(PAIRS)
    ]
    write_rows(folder / "train.jsonl", rows)
    write_rows(folder / "asked.jsonl", [{"prompt": "Who wrote Emma?", "completion": "Jane."}, {"text": "Bees."}])
    with small_pieces():
        vestige.index(
            model=str(folder / "tiny-model"), data=str(folder / "train.jsonl"), out=folder / "index", token_budget=60
        )
    return folder


class small_pieces:  # noqa: N801 (used like a function)
    """Every shard, or every batch, is a piece; fsync is what most of the time would go to."""

    def __enter__(self):
        self.before = IndexedGradients.piece_bytes, ExactGradients.piece_tokens
        IndexedGradients.piece_bytes, ExactGradients.piece_tokens = 1, (300, 300)

    def __exit__(self, *_):
        IndexedGradients.piece_bytes, ExactGradients.piece_tokens = self.before


def with_index(place, out, **changes):
    given = {"index": place / "index", "method": "influence"} | changes
    return ask(place, out, **given)


def without_index(place, out, **changes):
    given = {"model": str(place / "tiny-model"), "data": str(place / "train.jsonl"), "method": "grad-cos"} | changes
    return ask(place, out, self_influence=False, **given)


def ask(place, out, **given):
    settings = {"queries": str(place / "asked.jsonl"), "out": out, "self_influence": True, "trust": False} | given
    with small_pieces():
        return vestige.attribute(**settings)


def bytes_of(run):
    found = {name: (run / name).read_bytes() for name in TABLES if (run / name).exists()}
    record = json.loads((run / "run.json").read_text())
    return found | {key: record[key] for key in ("distribution", "groups")}


def partial(out):
    return out.with_name(f".{out.name}.partial")


@pytest.fixture(scope="module")
def whole(place):
    with_index(place, place / "whole")
    return bytes_of(place / "whole")


def ask_and_die(asked, place, out, step, count):
    """Ask, and die by SIGKILL just before the `step`-th file of a piece is renamed; write the number of them."""
    seen = 0

    def watch(event, args):
        nonlocal seen
        if event == "os.rename" and str(partial(out)) in str(args[0]):
            if seen == step:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    sys.addaudithook(watch)
    asked(place, out)
    count.value = seen


def die_at(asked, place, out, step):
    count = PROCESSES.Value("i", 0)
    child = PROCESSES.Process(target=ask_and_die, args=(asked, place, out, step, count))
    child.start()
    child.join()
    assert child.exitcode == (-signal.SIGKILL if step >= 0 else 0)
    return count.value


@pytest.mark.slow
def test_a_run_that_was_killed_again_and_again_is_the_run_that_was_not(place, tmp_path, whole):
    steps = die_at(with_index, place, tmp_path / "counted", -1)
    assert steps > 20
    assert bytes_of(tmp_path / "counted") == whole
    out, finished = tmp_path / "run", set()
    die_at(with_index, place, out, 2)
    for step in (8, 9, 14):
        die_at(with_index, place, out, step)
        assert not out.exists()
        markers = partial(out).glob("*/*.json")
        before, finished = finished, {path for path in markers if path.with_suffix(".safetensors").exists()}
        assert finished > before, "pieces of the run before were lost, or none was added"
    with_index(place, out)
    assert bytes_of(out) == whole
    assert not partial(out).exists()


@pytest.mark.slow
def test_without_an_index_a_killed_run_continues_too(place, tmp_path):
    without_index(place, tmp_path / "whole")
    die_at(without_index, place, tmp_path / "run", 9)
    assert list(partial(tmp_path / "run").glob("scoring/*.safetensors"))
    without_index(place, tmp_path / "run")
    assert bytes_of(tmp_path / "run") == bytes_of(tmp_path / "whole")


@pytest.mark.slow
def test_a_temporary_index_is_continued_and_goes_with_the_run(place, tmp_path):
    out = tmp_path / "run"
    die_at(temporary, place, out, 4)
    assert (partial(out) / "index").is_dir()
    temporary(place, out)
    assert (out / "scores.parquet").exists()
    assert not partial(out).exists()


def temporary(place, out):
    return without_index(place, out, method="influence", token_budget=60)


def count_pieces(monkeypatch):
    done = []
    original = PieceFiles.write

    def write(self, piece, tensors):
        done.append((self.folder.name, piece))
        original(self, piece, tensors)

    monkeypatch.setattr(PieceFiles, "write", write)
    return done


def leave_pieces(place, out):
    """A run that stopped after its first piece but one."""
    with pytest.raises(WorkElsewhere):
        with_index(place, out, shard="1/3")


@pytest.mark.slow
def test_shares_make_the_whole_and_an_empty_share_is_no_error(place, tmp_path, whole):
    out = tmp_path / "run"
    for share in ("1/3", "999/999", "3/3"):
        with pytest.raises(WorkElsewhere):
            with_index(place, out, shard=share)
    with pytest.raises(WorkElsewhere):  # of self-influence, which comes after the scores
        with_index(place, out, shard="2/3")
    with_index(place, out)
    assert bytes_of(out) == whole


@pytest.mark.slow
def test_grass_9_finished_pieces_are_not_computed_again(place, tmp_path, whole, monkeypatch):
    leave_pieces(place, tmp_path / "run")
    left = {int(path.stem) for path in partial(tmp_path / "run").glob("scoring/*.safetensors")}
    done = count_pieces(monkeypatch)
    with_index(place, tmp_path / "run")
    assert left
    assert not left & {piece for folder, piece in done if folder == "scoring"}
    assert bytes_of(tmp_path / "run") == whole


@pytest.mark.slow
def test_a_damaged_piece_is_found_and_computed_again(place, tmp_path, whole, monkeypatch):
    leave_pieces(place, tmp_path / "run")
    path = partial(tmp_path / "run") / "scoring" / "00003.safetensors"
    body = bytearray(path.read_bytes())
    body[-2] ^= 0x10
    path.write_bytes(body)
    done = count_pieces(monkeypatch)
    with_index(place, tmp_path / "run")
    assert ("scoring", 3) in done
    assert ("scoring", 0) not in done
    assert bytes_of(tmp_path / "run") == whole


@pytest.mark.slow
@pytest.mark.parametrize("changed", [{"damping": 0.2}, {"method": "grad-dot"}])
def test_grass_9_pieces_of_other_settings_are_not_used(place, tmp_path, changed, monkeypatch):
    leave_pieces(place, tmp_path / "run")
    done = count_pieces(monkeypatch)
    with_index(place, tmp_path / "run", **changed)
    assert ("scoring", 0) in done
    with_index(place, tmp_path / "fresh", **changed)
    assert bytes_of(tmp_path / "run") == bytes_of(tmp_path / "fresh")


@pytest.mark.slow
def test_settings_of_the_output_alone_keep_the_pieces(place, tmp_path, monkeypatch):
    leave_pieces(place, tmp_path / "run")
    done = count_pieces(monkeypatch)
    with_index(place, tmp_path / "run", k=3, dense=True)
    assert ("scoring", 0) not in done


@pytest.mark.slow
def test_grass_9_self_influence_in_a_fresh_process_needs_nothing_of_the_process_before(place, tmp_path, whole):
    die_at(with_index, place, tmp_path / "run", -1)
    assert bytes_of(tmp_path / "run")["self_influence.parquet"] == whole["self_influence.parquet"]


def test_a_job_of_one_piece_leaves_nothing_beside_the_run(place, tmp_path, monkeypatch, whole):
    done = count_pieces(monkeypatch)
    vestige.attribute(
        index=place / "index",
        queries=str(place / "asked.jsonl"),
        out=tmp_path / "run",
        method="influence",
        self_influence=True,
        trust=False,
    )
    assert done == []
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert (tmp_path / "run" / "scores.parquet").read_bytes() == whole["scores.parquet"]


@pytest.mark.slow
def test_grass_7_rates_are_named_after_what_was_done_and_count_this_share_alone(place, tmp_path, capfd, monkeypatch):
    monkeypatch.delenv("VESTIGE_QUIET", raising=False)
    out = tmp_path / "run"
    with pytest.raises(WorkElsewhere):
        with_index(place, out, shard="1/2")
    capfd.readouterr()
    with_index(place, out)
    lines = [line for line in capfd.readouterr().err.splitlines() if line.endswith("/s")]
    scoring = next(line for line in lines if line.startswith("Scoring"))
    own = next(line for line in lines if line.startswith("Self-influence"))
    assert "train x query pairs/s" in scoring
    assert int(scoring.split()[1]) < 2 * 48
    assert own.split()[1:3] == ["48", "examples"]


@pytest.mark.slow
def test_a_profile_lies_beside_the_scores(place, tmp_path):
    with_index(place, tmp_path / "run", profile=True)
    profile = json.loads((tmp_path / "run" / "profile.json").read_text())
    assert min(profile["seconds"][phase] for phase in ("forward", "backward", "reading", "writing", "scoring")) > 0
    assert sum(profile["seconds"].values()) == pytest.approx(profile["total_seconds"], abs=1e-4)


@pytest.mark.slow
def test_the_bytes_read_of_a_profile_are_the_stored_ones(place, tmp_path):
    built = {"model": place / "tiny-model", "data": str(place / "train.jsonl"), "out": tmp_path / "idx"}
    vestige.index(**built, compress="mask:8", dtype="int8")
    stored = sum(path.stat().st_size for path in (tmp_path / "idx" / "shards").glob("*.safetensors"))
    options = {"index": tmp_path / "idx", "queries": ["Why is the sky blue?"], "trust": False, "max_new_tokens": 2}
    vestige.attribute(**options, method="grad-dot", out=tmp_path / "run", profile=True)
    read = json.loads((tmp_path / "run" / "profile.json").read_text())["bytes"]["read"]
    assert 0.5 * stored < read <= stored
