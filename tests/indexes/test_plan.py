import numpy as np
import pytest

from tests.indexes.synthetic import build, draft, fingerprint_of, lengths_of, planned
from vestige.data import plan_batches
from vestige.errors import DataError, IndexMismatch
from vestige.indexes import PlanRecord, plan_index


def plan_for(lengths, tmp_path, **changes):
    return plan_index(tmp_path / "none", draft(len(lengths), **changes), lengths, fingerprint_of)


def test_every_row_is_in_one_shard_and_no_batch_is_split(tmp_path):
    lengths = lengths_of(200)
    manifest, plan = plan_for(lengths, tmp_path)
    made = [batch for shard in plan.shards for batch in shard.batches]
    wanted = plan_batches(lengths, manifest.token_budget)
    assert len(made) == len(wanted)
    assert all(np.array_equal(one, other) for one, other in zip(made, wanted, strict=True))
    assert sorted(np.concatenate([shard.rows for shard in plan.shards])) == list(range(200))
    assert manifest.shard_rows == tuple(len(shard.rows) for shard in plan.shards)


def test_a_small_job_is_cut_into_about_as_many_shards_as_asked(tmp_path):
    _, plan = plan_for(lengths_of(2000), tmp_path, plan=PlanRecord(fewest_shards=24))
    assert 24 <= len(plan) <= 32
    # Tokens stand for time: no shard takes much longer than another, whatever its rows.
    tokens = [int(sum(len(batch) * plan.lengths[batch].max() for batch in shard.batches)) for shard in plan.shards]
    assert max(tokens[:-1]) < 1.5 * min(tokens[:-1])


def test_shards_stay_below_their_bytes(tmp_path):
    manifest, plan = plan_for(
        np.full(500, 10), tmp_path, token_budget=100, plan=PlanRecord(fewest_shards=1, shard_bytes=70 * 68)
    )
    assert manifest.row_bytes == 68
    assert [len(shard.rows) for shard in plan.shards] == [70] * 7 + [10]


def test_a_long_job_with_small_rows_is_cut_by_tokens(tmp_path):
    _, plan = plan_for(np.full(4096, 2**11), tmp_path, token_budget=2**14, plan=PlanRecord(fewest_shards=2))
    assert len(plan) == 8


def test_a_batch_larger_than_a_shard_is_a_shard(tmp_path):
    _, plan = plan_for(np.full(40, 10), tmp_path, token_budget=200, plan=PlanRecord(shard_bytes=1))
    assert [len(shard.rows) for shard in plan.shards] == [20, 20]


def test_no_example_is_an_error(tmp_path):
    with pytest.raises(DataError, match="nothing to index"):
        plan_for(np.zeros(0, dtype=np.int64), tmp_path)


def test_the_plan_is_the_same_each_time_and_another_is_noticed(tmp_path):
    manifest, _ = planned(tmp_path)
    assert planned(tmp_path)[0] == manifest
    longer = lengths_of(60)
    longer[3] += 50
    other, _ = plan_for(longer, tmp_path)
    assert other.plan != manifest.plan


def test_new_data_is_a_stage_of_its_own(tmp_path):
    build(tmp_path / "index")
    manifest, plan = planned(tmp_path / "index", 90, append=True)
    assert [(stage.start, stage.stop) for stage in manifest.plan.stages] == [(0, 60), (60, 90)]
    old = len(manifest.plan.stages[0].shard_rows)
    assert sorted(np.concatenate([shard.rows for shard in plan.shards[old:]])) == list(range(60, 90))
    assert [shard.number for shard in plan.shards] == list(range(len(plan)))


def test_new_data_is_added_only_when_asked(tmp_path):
    build(tmp_path / "index")
    with pytest.raises(IndexMismatch, match=r"holds 60 examples and the data has 90.*--append"):
        planned(tmp_path / "index", 90)


@pytest.mark.parametrize("append", [False, True])
def test_data_that_begins_differently_is_refused(tmp_path, append):
    build(tmp_path / "index")

    def shuffled(start, stop):
        return fingerprint_of(start + 1, stop)

    with pytest.raises(IndexMismatch, match="begins differently"):
        plan_index(tmp_path / "index", draft(90), lengths_of(90), shuffled, append=append)


def test_data_that_shrank_is_refused(tmp_path):
    build(tmp_path / "index")
    with pytest.raises(IndexMismatch, match=r"pairs.jsonl \(60 examples\)  pairs.jsonl \(40 examples\)"):
        planned(tmp_path / "index", 40, append=True)


def test_another_cut_is_shown_as_such_and_not_as_other_data(tmp_path):
    build(tmp_path / "index")
    with pytest.raises(IndexMismatch) as refusal:
        plan_index(tmp_path / "index", draft(60, max_length=64), lengths_of(60), lambda *_: "other tokens")
    assert "max-length  128      64" in str(refusal.value)
    assert "pairs.jsonl" not in str(refusal.value)
