from types import SimpleNamespace

import pytest
import torch

from tests.architectures import build
from vestige.checks import (
    ALTERNATIVES,
    Cost,
    DoctorReport,
    Trial,
    check_disk_space,
    check_memory,
    check_time,
    estimate_costs,
    try_batch,
)
from vestige.compress import parse_spec
from vestige.data import plan_batches
from vestige.errors import SpecError
from vestige.indexes import Index, draft_manifest, index, read_inputs
from vestige.models import load_model
from vestige.settings import DoctorSettings


@pytest.mark.slow
def test_the_disk_is_what_the_index_takes(examined, rows, tmp_path):
    model = build("llama", torch.float32)
    for dtype in ("float16", "float32", "int8"):
        cost = examined(model, dtype=dtype, compress="mask:4x4").costs[0]
        built = index(model=model, data=rows, out=tmp_path / dtype, dtype=dtype, compress="mask:4x4")
        assert isinstance(built, Index)
        assert cost.row_bytes[dtype] == built.manifest.row_bytes
        assert cost.disk_bytes[dtype] == built.manifest.row_bytes * len(rows)
        assert cost.numbers == built.manifest.width


@pytest.mark.slow
def test_the_compression_asked_for_comes_first_and_once(examined):
    model = build("llama", torch.float32)
    asked = examined(model, compress="logra:4x4").costs
    assert [cost.compress for cost in asked] == ["logra:4x4", *ALTERNATIVES]
    whole = examined(model, compress="none").costs
    assert [cost.compress for cost in whole] == ["none", *(one for one in ALTERNATIVES if one != "none")]
    assert all(cost.seconds > 0 for cost in asked)
    assert asked[0].memory_bytes < asked[-1].memory_bytes


def drafted(rows, compress):
    """Settings, inputs, manifest and compression of an index that is not made."""
    settings = DoctorSettings(model=build("llama", torch.float32), data=rows, compress=compress)
    inputs = read_inputs(settings, settings.model, settings.data, settings.components)
    spec = parse_spec(compress)
    return settings, inputs, draft_manifest(settings, inputs, spec), spec


def test_memory_is_that_of_a_part_of_a_shard_whatever_the_shard(rows):
    def costed(part_bytes):
        settings, inputs, manifest, spec = drafted(rows, "mask:4x4")
        trial = Trial(inputs.data, None, None, 1000)
        return estimate_costs(settings, inputs, manifest, spec, trial, part_bytes)[0], manifest, inputs

    cost, manifest, inputs = costed(0)
    widest = max(map(len, plan_batches(inputs.data.lengths, manifest.token_budget, manifest.plan.max_examples)))
    # Not even a batch fits into a part of nothing: it is held once computed and once stored.
    assert cost.memory_bytes == 1000 + 2 * 4 * manifest.width * widest
    # And there are never more rows than examples.
    assert costed(2**40)[0].memory_bytes == 1000 + 4 * manifest.width * (len(rows) + widest)


def test_a_compression_of_which_one_row_is_too_large_is_not_tried(rows):
    settings, inputs, manifest, spec = drafted(rows, "none")
    trial = try_batch(settings, inputs, manifest, spec, rows_bytes=8 * 3000)
    assert trial.content is None
    costs = estimate_costs(settings, inputs, manifest, spec, trial)
    assert costs[0].seconds is None
    check = check_time(costs[0], trial)
    assert check.value == "not measured"
    assert "not tried" in str(DoctorReport("model", "data", len(rows), "float16", (check,), (), costs, 0))


COST = Cost("none", 10, 1.0, 100, {"float16": 20, "float32": 40, "int8": 10}, {"float16": 60, "float32": 90, "int8": 9})


@pytest.mark.parametrize(
    ("dtype", "free", "verdict"),
    [("bfloat16", 59, "bad"), ("float16", 119, "warn"), ("float16", 121, "good"), ("int8", 59, "good")],
)
def test_disk_is_compared_with_what_is_free(dtype, free, verdict):
    assert check_disk_space(COST, dtype, free, 3).verdict == verdict


@pytest.mark.parametrize(("limit", "verdict"), [(99, "bad"), (110, "warn"), (130, "good")])
def test_memory_is_compared_with_what_there_is(limit, verdict):
    assert check_memory(COST, limit, "cpu").verdict == verdict


@pytest.mark.slow
def test_a_full_disk_is_bad_in_the_report(examined, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(total=100, used=90, free=10))
    report = examined(build("llama", torch.float32))
    assert report["disk"].verdict == "bad"
    assert "--dtype int8" in report["disk"].advice


def test_settings_that_the_index_refuses_are_refused(examined):
    with pytest.raises(SpecError):
        examined(build("llama", torch.float32), compress="nonsense:3")
    with pytest.raises(SpecError):
        examined(build("llama", torch.float32), components="nothing.like.this")


@pytest.mark.slow
def test_time_is_said_to_be_measured(workshop, examined):
    loaded = load_model(workshop / "tiny-model")
    report = examined(loaded.model, tokenizer=loaded.tokenizer, data=str(workshop / "train.jsonl"))
    assert report["time"].number == report.costs[0].seconds
    assert check_time.__doc__
