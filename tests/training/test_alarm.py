import json

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch

from tests.architectures import VOCABULARY, build
from tests.training.workbench import padded, slow_loss
from vestige.data import NO_TARGET
from vestige.errors import DataError, SpecError
from vestige.measures import psmi
from vestige.online import ID_KEY, CollatorWithIds
from vestige.training import Alarm, Trigger, Watched, answer_codes, find_at_risk, write_at_risk

CLASSES = (5, 9, 11)


def questions(count: int = 40) -> list[dict]:
    """A prompt of uneven length and a one-token answer, one of three."""
    draw = np.random.default_rng(0)
    found = []
    for row in range(count):
        prompt = draw.integers(3, VOCABULARY, 3 + row % 5).tolist()
        answer = CLASSES[row % 3]
        labels = [NO_TARGET] * len(prompt) + [answer]
        found.append({ID_KEY: f"q{row}", "input_ids": [*prompt, answer], "labels": labels})
    return found


def watched(rows: list[dict]) -> Watched:
    return Watched(rows, CollatorWithIds(padded), 7)


def risk(alarm: Alarm, rows: list[dict] | None = None, first: float = 3.0):
    from contextlib import nullcontext

    rows = questions() if rows is None else rows
    return find_at_risk(alarm, watched(rows), build("llama", torch.float32).train(), first, nullcontext)


def test_the_trigger_rings_once_when_the_running_median_is_low():
    trigger = Trigger(below=0.05, window=3)
    rings = [trigger.update([loss]) for loss in [10, 11, 9, 1, 0.4, 5, 0.4, 0.3, 0.2, 0.1]]
    # First median 10, so it takes one below 0.5: of (0.4, 5, 0.4) the median is 0.4.
    assert rings == [False] * 6 + [True, False, False, False]
    assert trigger.first == 10


def test_the_trigger_hears_losses_one_by_one_or_by_step_and_passes_over_what_is_no_number():
    losses = np.random.default_rng(0).exponential(2.0 ** -np.arange(60))
    one, several = Trigger(0.05, 8), Trigger(0.05, 8)
    single = [one.update([loss]) for loss in losses]
    steps = [several.update([*losses[begin : begin + 4], np.nan]) for begin in range(0, 60, 4)]
    assert (sum(single), sum(steps)) == (1, 1)
    assert single.index(True) // 4 <= steps.index(True)


def test_psmi_is_that_of_the_last_states_before_the_answer():
    rows = questions()
    model = build("llama", torch.float32)
    states = []
    for row in rows:
        with torch.no_grad():
            hidden = model(input_ids=torch.tensor([row["input_ids"]]), output_hidden_states=True).hidden_states
        states.append(hidden[-1][0, -2].double().numpy())
    expected = psmi(np.stack(states), np.array([row["labels"][-1] for row in rows])).mean
    found = risk(Alarm())
    assert found.value == pytest.approx(expected, abs=1e-4)
    assert (found.measure, found.layer, found.rule) == ("psmi", 2, "psmi <= 0 (untuned)")
    assert found.flagged.tolist() == (expected <= 0).tolist()
    assert found.rank[np.argmin(expected)] == 1


@pytest.mark.slow
def test_the_layer_may_be_chosen_by_the_answers_or_given():
    assert risk(Alarm(layer="smi")).layer in (1, 2)
    assert risk(Alarm(layer=1)).layer == 1
    with pytest.raises(DataError, match="layers 0 to 2"):
        risk(Alarm(layer=7))


def test_loss_and_gap_are_those_of_the_answers():
    rows, model = questions(), build("llama", torch.float32)
    losses = [slow_loss(model, row) for row in rows]
    found = risk(Alarm(measure="loss"), first=3.5)
    assert found.value == pytest.approx(losses, rel=1e-5)
    assert found.flagged.tolist() == [loss >= 3.5 for loss in losses]
    assert found.rank[int(np.argmax(losses))] == 1
    gap = risk(Alarm(measure="gap"))
    assert gap.flagged.tolist() == (gap.value <= 0).tolist()
    assert gap.rank[int(np.argmin(gap.value))] == 1


def test_thresholds_with_tuning():
    values = risk(Alarm(measure="loss")).value
    tuned = risk(Alarm(measure="loss", threshold=float(np.sort(values)[-4])))
    assert tuned.flagged.sum() == 4
    share = risk(Alarm(measure="loss", quantile=0.1))
    assert share.flagged.sum() == 4
    assert share.flagged.tolist() == tuned.flagged.tolist()
    assert "0.1 of the examples" in share.rule
    below = risk(Alarm(threshold=-1e9))
    assert not below.flagged.any()


def test_answers_that_nobody_shares_have_no_value_and_no_flag():
    rows = questions()
    rows[4]["labels"][-1] = rows[4]["input_ids"][-1] = 30
    rows[5]["labels"][-1] = NO_TARGET
    found = risk(Alarm(), rows)
    assert np.isnan(found.value[[4, 5]]).all()
    assert np.isfinite(np.delete(found.value, [4, 5])).all()
    assert not found.flagged[[4, 5]].any()
    assert set(found.rank[[4, 5]]) == {39, 40}
    with pytest.raises(DataError, match="Alarm\\(measure='loss'\\)"):
        answer_codes([(1,), (2,), (), ()])
    with pytest.raises(DataError, match="share an answer"):
        answer_codes([])


def test_the_list_on_disk_begins_with_those_most_at_risk(tmp_path):
    rows = questions()
    rows[4]["labels"][-1] = rows[4]["input_ids"][-1] = 30
    found = risk(Alarm(), rows)
    write_at_risk(tmp_path, [row[ID_KEY] for row in rows], found, step=17)
    table = parquet.read_table(tmp_path / "at_risk.parquet")
    lines = [json.loads(line) for line in (tmp_path / "at_risk.jsonl").read_text().splitlines()]
    assert table.to_pylist() == lines
    assert [line["rank"] for line in lines] == list(range(1, 41))
    assert lines[0]["example_id"] == f"q{int(np.nanargmin(found.value))}"
    assert (lines[-1]["example_id"], lines[-1]["value"], lines[-1]["flagged"]) == ("q4", None, False)
    assert {line["step"] for line in lines} == {17}


@pytest.mark.parametrize(
    "settings",
    [
        {"measure": "lira"},
        {"below": 1.5},
        {"window": 0},
        {"threshold": 0.1, "quantile": 0.1},
        {"quantile": 1.0},
        {"layer": "first"},
    ],
)
def test_an_alarm_that_cannot_be_is_refused(settings):
    with pytest.raises(SpecError):
        Alarm(**settings)
