"""Sweeps that run: reuse, failure, kills, workers, shares."""

import json
import os
import shlex
import shutil
import signal
from pathlib import Path

import pyarrow.parquet as parquet
import pytest

from sweep.conftest import results
from vestige.cli import main
from vestige.distributed import ROLE_VARIABLE
from vestige.errors import CorruptFile, IndexMismatch, PieceFailed, UserError, WorkElsewhere
from vestige.jobs import Role
from vestige.registry import COMMANDS
from vestige.workspace import describe
from vestige_recipes.sweep import read_grid, run as run_module, sweep, sweep_report
from vestige_recipes.sweep.cells import cells_of


@pytest.mark.slow
def test_every_cell_is_run_and_the_table_says_what_it_was(grid, run, here):
    report = run(grid({"k": [1, 2], "dense": [False, True]}))
    assert report.counts() == {"done": 4}
    table = parquet.read_table(here / "sw" / "cells.parquet").to_pydict()
    assert table["settings.k"] == [1, 1, 2, 2]
    assert table["settings.dense"] == [False, True, False, True]
    assert table["settings.method"] == ["bm25"] * 4
    assert table["state"] == ["done"] * 4
    assert table["figures.data.examples"] == [5] * 4
    assert table["figures.trust.finite numbers.value"] == [0.0] * 4
    assert all(seconds > 0 for seconds in table["seconds"])
    row = report[{"k": 2, "dense": True}]
    assert (here / "sw" / "named" / "k=2,dense=True" / "run.json").exists()
    assert json.loads((here / "sw" / "cells" / row.cell / "out" / "run.json").read_text())["config"]["k"] == 2
    assert "4 done" in describe(here / "sw")
    assert json.loads((here / "sw" / "cells.json").read_text())["cells"][0]["point"] == {"k": 1, "dense": False}


@pytest.mark.slow
def test_the_command_in_a_cell_is_what_runs_it_alone(run):
    """A command of two words had its second word twice."""
    report = run({"verb": "data split", "base": {"data": "train.jsonl"}, "axes": {"seed": [1]}})
    folder = Path(report.rows[0].folder)
    typed = json.loads((folder.parent / "cell.json").read_text())["command"]
    first = (folder / "train.jsonl").read_bytes()
    shutil.rmtree(folder)
    main(shlex.split(typed)[1:])
    assert (folder / "train.jsonl").read_bytes() == first


@pytest.mark.slow
def test_a_grown_grid_runs_only_its_new_cells(grid, run, here, monkeypatch):
    run(grid({"k": [1, 2]}))
    before = results(here / "sw")
    done = []
    original = run_module.run_cell
    monkeypatch.setattr(run_module, "run_cell", lambda cell: (done.append(cell.point), original(cell)))
    report = run(grid({"k": [3, 2, 1]}))
    assert done == [{"k": 3}]
    assert report.counts() == {"done": 3}
    assert before.items() <= results(here / "sw").items()


def test_a_dry_run_lists_the_cells_and_writes_nothing(grid, run, here):
    assert run(grid({"k": [1, 2]}), dry_run=True).counts() == {"missing": 2}
    assert not (here / "sw").exists()


@pytest.mark.slow
def test_a_cell_that_fails_is_reported_with_its_log_and_the_others_go_on(grid, run, here):
    content = grid({"data": ["train.jsonl", "nowhere.jsonl", "other.jsonl"]})
    with pytest.raises(PieceFailed, match=r"1 of 3 pieces failed.*(?s:.)*data=nowhere.jsonl"):
        run(content, retries=1)
    report = sweep_report(here / "sw")
    assert report.counts() == {"done": 2, "failed": 1}
    failed = report[{"data": "nowhere.jsonl"}]
    assert "DataError" in failed.error
    with open(failed.log) as log:
        assert "DataError" in log.read()
    assert "failed" in describe(here / "sw")
    assert parquet.read_table(here / "sw" / "cells.parquet")["state"].to_pylist() == ["done", "failed", "done"]
    (here / "nowhere.jsonl").write_bytes((here / "train.jsonl").read_bytes())
    assert run(content).counts() == {"done": 3}


@pytest.mark.slow
def test_data_that_changed_is_refused_and_not_reused(grid, run, here):
    run(grid({"k": [1, 2]}))
    (here / "train.jsonl").write_text(json.dumps({"text": "all new"}) + "\n")
    with pytest.raises(IndexMismatch, match=r"2 finished cells(?s:.)*train.jsonl has changed"):
        run(grid({"k": [1, 2]}))


@pytest.mark.slow
def test_a_kill_between_the_run_and_its_marker_does_no_harm(grid, run, here):
    report = run(grid({"k": [1, 2]}))
    before = results(here / "sw")
    (here / "sw" / "cells" / report.rows[0].cell / "done.json").unlink()
    assert run(grid({"k": [1, 2]})).counts() == {"done": 2}
    assert results(here / "sw") == before


def test_a_training_that_was_interrupted_is_continued_and_not_replaced(here):
    """A training has its record from the start, a run of scores in the end only."""
    for verb, replaced in (("train", False), ("bank", False), ("index", False), ("attribute", True)):
        cell = cells_of(read_grid({"verb": verb, "base": {"data": "d", "model": "m"} | QUERIES.get(verb, {})}), here)[0]
        cell.out.mkdir(parents=True)
        assert run_module.allow_resume(COMMANDS.find(verb), cell.settings).overwrite is False
        (cell.out / "run.json").write_text("{}")
        assert run_module.allow_resume(COMMANDS.find(verb), cell.settings).overwrite is replaced, verb


QUERIES = {"attribute": {"queries": "q"}}


@pytest.mark.slow
def test_a_torn_marker_does_not_count(grid, run, here):
    report = run(grid({"k": [1, 2]}))
    (here / "sw" / "cells" / report.rows[0].cell / "done.json").write_text('{"cell": "')
    assert sweep_report(here / "sw").counts() == {"done": 1, "missing": 1}
    assert run(grid({"k": [1, 2]})).counts() == {"done": 2}


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{"seconds": "x"}, {"seconds": float("nan")}, {"figures": {"a": [1]}}, {"figures": 5}, {"inputs": None}]
)
def test_a_marker_of_other_types_does_not_count(changes, grid, run, here):
    report = run(grid({"k": [1, 2]}))
    path = here / "sw" / "cells" / report.rows[0].cell / "done.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | changes))
    assert sweep_report(here / "sw").counts() == {"done": 1, "missing": 1}
    assert run(grid({"k": [1, 2]})).counts() == {"done": 2}


@pytest.mark.parametrize(
    "changes",
    [
        {"axes": 5},
        {"verb": None},
        {"cells": [[]]},
        {"cells": [{"id": "a\0b", "point": {}, "settings": {}}]},
        {"cells": [{"id": "../..", "point": {}, "settings": {}}]},
        {"cells": [{"id": "0" * 16, "point": 5, "settings": {}}]},
    ],
)
def test_a_record_of_other_types_is_refused(changes, grid, run, here):
    run(grid({"k": [1]}))
    path = here / "sw" / "sweep.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | changes))
    for command in (lambda: describe(here / "sw"), lambda: run(grid({"k": [1]}))):
        with pytest.raises(CorruptFile, match=r"sweep\.json does not read"):
            command()


@pytest.mark.slow
def test_a_file_whose_name_is_no_text_lies_in_a_folder_of_data(grid, run, here):
    (here / "texts").mkdir()
    shutil.copy(here / "train.jsonl", here / "texts")
    (here / "texts" / os.fsdecode(b"caf\xe9.txt")).write_text("x")
    assert run(grid({"k": [1, 2]}, data=str(here / "texts"))).counts() == {"done": 2}


@pytest.mark.slow
def test_workers_do_the_cells_of_the_grid_as_it_was(grid, run, here):
    content = grid({"k": list(range(1, 5))})
    alone = sweep(content, out=here / "alone")
    assert run(content, workers=2).counts() == {"done": 4} == alone.counts()
    assert results(here / "sw") == results(here / "alone")
    logs = list((here / "sw" / "launch" / "sweep" / "logs").iterdir())
    assert len(logs) == 2


@pytest.mark.slow
def test_shares_make_the_whole(grid, run):
    content = grid({"k": [1, 2, 3]})
    with pytest.raises(WorkElsewhere, match="share 1/2 is done"):
        run(content, shard="1/2")
    assert run(content, shard="2/2").counts() == {"done": 3}


@pytest.mark.slow
def test_a_cell_inside_a_worker_is_a_job_of_its_own(grid, run, here, monkeypatch):
    """A verb inside a worker took itself for a worker of its own job, and found its pieces missing."""
    seen = []
    original = run_module.run_cell

    def in_a_worker(cell):
        role = Role("worker", str(here / "elsewhere"), parent=os.getppid())
        monkeypatch.setenv(ROLE_VARIABLE, role.as_environment()[ROLE_VARIABLE])
        original(cell)
        seen.append(os.environ.pop(ROLE_VARIABLE))

    monkeypatch.setattr(run_module, "run_cell", in_a_worker)
    report = run(grid({"damping": [0.1, 1.0]}, method="random"))
    assert report.counts() == {"done": 2}
    assert len(seen) == 2


@pytest.mark.slow
def test_a_signal_ends_the_sweep_within_a_cell_and_it_continues(grid, run, here, monkeypatch):
    original = run_module.run_cell

    def interrupted(cell):
        if cell.point["k"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        original(cell)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "run_cell", interrupted)
        with pytest.raises(SystemExit) as ended:
            run(grid({"k": [1, 2, 3]}))
    assert ended.value.code == 128 + signal.SIGTERM
    assert sweep_report(here / "sw").counts()["done"] in (1, 2)
    assert run(grid({"k": [1, 2, 3]})).counts() == {"done": 3}


def test_a_folder_without_a_sweep_is_told_so(tmp_path):
    with pytest.raises(UserError, match="holds no sweep"):
        sweep_report(tmp_path)
