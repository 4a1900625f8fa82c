import json
import os
import subprocess
import sys

import pytest
import torch

from tests.architectures import build
from tests.online.workbench import DATA, mean_loss, named, step_rows, train, training_model, validation
from vestige.errors import CorruptFile, IndexMismatch, SpecError, UserError
from vestige.online import OnlineAttribution, OnlineLog


def run(out, steps: int, flush_every: int = 3, start_step: int = 0, **settings) -> OnlineAttribution:
    engine = OnlineAttribution(
        build("llama"), validation(2), out=out, flush_every=flush_every, start_step=start_step, **settings
    )
    for step in range(start_step, start_step + steps):
        rows = step_rows(step)
        with engine.step(named(rows), learning_rate=0.1 / (step + 1)):
            mean_loss(engine.model, DATA.batch(rows)).backward()
        engine.model.zero_grad()
    return engine


def test_trap_b4_5_a_save_interval_of_three_over_seven_steps_loses_nothing(tmp_path):
    with run(tmp_path / "log", 7):
        on_disk = OnlineLog.open(tmp_path / "log").table()
        assert sorted(set(on_disk["step"].to_pylist())) == [1, 2, 3, 4, 5, 6]
    table = OnlineLog.open(tmp_path / "log").table()
    assert table["step"].to_pylist() == [step for step in range(1, 8) for _ in range(4)]
    assert table["id"].to_pylist() == [name for step in range(7) for name in named(step_rows(step))]
    assert [path.name for path in sorted((tmp_path / "log").glob("steps-*"))] == [
        f"steps-{first:010d}.parquet" for first in (1, 4, 7)
    ]


def test_influence_is_the_sum_of_rate_times_score(tmp_path):
    losses, engine = train(
        training_model("gpt2"),
        lambda model, optimizer: OnlineAttribution(model, validation(2), optimizer=optimizer, out=tmp_path / "log"),
    )
    log = engine.log
    table = log.table().to_pylist()
    rates = [0.01 * (1 - step / 20) for step in range(6)]
    assert [row["learning_rate"] for row in table] == pytest.approx([rate for rate in rates for _ in range(4)])
    assert [row["loss"] for row in table] == pytest.approx([loss for loss in losses for _ in range(4)])
    wanted: dict[str, float] = {}
    for row in table:
        wanted[row["id"]] = wanted.get(row["id"], 0.0) + row["learning_rate"] * row["score"]
    found = log.influence()
    assert {name: entry.influence for name, entry in found.items()} == pytest.approx(wanted)
    assert sum(entry.steps for entry in found.values()) == 24
    best = max(wanted, key=lambda name: wanted[name])
    assert log.top(1)[0].id == best
    assert log.bottom(len(found))[-1].id == best


@pytest.mark.slow
def test_a_resumed_training_has_every_step_once(tmp_path):
    run(tmp_path / "whole", 8).flush()
    run(tmp_path / "log", 7).flush()
    run(tmp_path / "log", 3, start_step=5).flush()  # the checkpoint was at step 5, within the second part
    assert OnlineLog.open(tmp_path / "log").table().equals(OnlineLog.open(tmp_path / "whole").table())


def test_a_log_is_not_mixed_with_another_training(tmp_path):
    run(tmp_path / "log", 2).flush()
    with pytest.raises(IndexMismatch, match="start_step"):
        run(tmp_path / "log", 1)
    with pytest.raises(IndexMismatch, match="other components"):
        run(tmp_path / "log", 1, start_step=2, components=("mlp",))
    with pytest.raises(IndexMismatch, match="second order"):
        run(tmp_path / "log", 1, start_step=2, second_order=True)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(IndexMismatch, match="other files"):
        run(tmp_path / "notes", 1)
    assert OnlineLog.open(tmp_path / "log").last_step() == 2


def test_a_gap_is_announced(tmp_path, capfd):
    run(tmp_path / "log", 2).flush()
    run(tmp_path / "log", 1, start_step=5).flush()
    assert "ends at step 2, the training continues after step 5" in capfd.readouterr().err


@pytest.mark.slow
def test_a_kill_leaves_whole_parts_and_the_next_training_clears_up(tmp_path):
    code = (
        "import os, torch; torch.set_num_threads(1)\n"
        "from tests.online.test_log import run\n"
        f"run({str(tmp_path / 'log')!r}, 5, flush_every=2)\n"
        "os._exit(9)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 9, done.stderr
    assert OnlineLog.open(tmp_path / "log").last_step() == 4
    run(tmp_path / "log", 4, start_step=4).flush()
    assert OnlineLog.open(tmp_path / "log").table()["step"].to_pylist() == [s for s in range(1, 9) for _ in range(4)]


def test_damaged_and_foreign_files_are_told(tmp_path):
    with pytest.raises(UserError, match="no log"):
        OnlineLog.open(tmp_path)
    run(tmp_path / "log", 4).flush()
    part = tmp_path / "log" / "steps-0000000004.parquet"
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(CorruptFile, match="steps-0000000004"):
        OnlineLog.open(tmp_path / "log").table()
    header = tmp_path / "log" / "log.json"
    header.write_text(json.dumps(json.loads(header.read_text()) | {"format": 99}))
    with pytest.raises(UserError, match="newer"):
        OnlineLog.open(tmp_path / "log")
    header.write_text("{")
    with pytest.raises(CorruptFile, match=r"log\.json"):
        OnlineLog.open(tmp_path / "log")


def test_an_engine_without_a_folder_has_no_log():
    engine = OnlineAttribution(build("llama"), validation(2))
    with pytest.raises(SpecError, match="out=FOLDER"):
        _ = engine.log
    assert torch.is_grad_enabled()
