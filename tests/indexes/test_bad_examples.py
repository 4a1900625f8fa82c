"""An example whose loss or gradient is not finite: named and fatal, or left out and listed."""

import json

import pytest
import torch

from tests.indexes.synthetic import build, compute, work_of
from vestige.errors import CorruptFile, NonFinite
from vestige.indexes import Index, marker_path, read_marker, shard_path


def poisoned(batches):
    (made,) = compute(batches)
    made.loss[made.example == 17] = float("nan")
    made.gradients[made.example == 21] = float("inf")
    return [made]


def test_it_is_fatal_by_default_and_names_the_way_out(tmp_path):
    with pytest.raises(NonFinite, match=r'"e(17|21)" \(row (17|21)\).*--skip-bad'):
        build(tmp_path, compute=poisoned)


def test_skipped_it_holds_zeros_and_is_listed_and_no_other_row_changes(tmp_path):
    build(tmp_path / "good")
    build(tmp_path / "bad", compute=poisoned, skip_bad=True)
    good, bad = Index.open(tmp_path / "good"), Index.open(tmp_path / "bad")
    assert bad.skipped == (17, 21)
    assert good.skipped == ()
    assert bad.verify() == []
    rows = bad.gradients_of([17, 21])
    assert torch.equal(rows, torch.zeros_like(rows))
    others = [row for row in range(60) if row not in (17, 21)]
    assert torch.equal(bad.gradients_of(others), good.gradients_of(others))
    # Markers of an index without such examples have the bytes that they always had.
    assert "skipped" not in json.loads(marker_path(tmp_path / "good", 0).read_text())


def test_missing_shards_are_listed_at_the_end(tmp_path):
    build(tmp_path)
    work = work_of(tmp_path)
    for number in (1, 2):
        marker_path(tmp_path, number).unlink()
    with pytest.raises(CorruptFile, match=r"2 of .* shards .* shard 1: missing; shard 2: missing"):
        work.pieces.reduce()


def test_overlapping_shards_are_listed_at_the_end(tmp_path):
    build(tmp_path)
    work = work_of(tmp_path)
    sizes = Index.open(tmp_path).manifest.shard_rows
    pair = next((a, b) for a in range(len(sizes)) for b in range(a + 1, len(sizes)) if sizes[a] == sizes[b])
    shard_path(tmp_path, pair[1]).write_bytes(shard_path(tmp_path, pair[0]).read_bytes())
    assert read_marker(tmp_path, pair[1]) is not None
    with pytest.raises(CorruptFile, match=rf"shard {pair[1]} overlaps with {pair[0]}; rows .* are in no shard"):
        work.pieces.reduce()
