import json

import pytest
from pydantic import ValidationError

from tests.indexes.synthetic import build, draft, hashes, planned
from vestige.errors import CorruptFile, IndexMismatch, UserError
from vestige.indexes import (
    CompressionIdentity,
    IndexedComponent,
    ModelIdentity,
    difference,
    expect_shards,
    publish_manifest,
    read_manifest,
)


def test_a_manifest_reads_back_equal_and_serialises_the_same(tmp_path):
    manifest, _ = planned(tmp_path)
    publish_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    assert manifest.to_json() == planned(tmp_path)[0].to_json()


def test_width_and_bytes_per_row_follow_from_the_components():
    assert draft().width == 24
    # float16: 24 numbers of 2 bytes, loss, norm and scale of 4, the example's row of 8.
    assert draft().row_bytes == 24 * 2 + 12 + 8
    assert draft(dtype="float32").row_bytes == 24 * 4 + 8 + 8


def test_columns_that_overlap_are_refused():
    parts = [IndexedComponent(name=name, kind="linear", shape=(2, 2), start=0, stop=4) for name in "ab"]
    with pytest.raises(ValidationError, match="must follow one another"):
        draft(components=parts)
    # Compressed as one vector, all components share all columns.
    assert draft(components=parts, compression=CompressionIdentity(spec="sjlt:4", scope="model")).width == 4


@pytest.mark.parametrize(
    ("field", "change", "shown"),
    [
        ("model", {"model": ModelIdentity(name="other", fingerprint="n" * 64)}, "other (nnnnnnnn)"),
        ("compression", {"compression": CompressionIdentity(spec="sjlt:9")}, "sjlt:9"),
        ("seed", {"seed": 1}, "1"),
        ("dtype", {"dtype": "int8"}, "int8"),
        ("loss", {"loss": "mean"}, "mean"),
        ("precision", {"precision": "bfloat16"}, "bfloat16"),
        ("max-length", {"max_length": None}, "none"),
        ("chat", {"chat": True}, "yes"),
        ("token-budget", {"token_budget": 301}, "301"),
        ("components", {"components": draft().components[:1]}, "1 components, 16 columns"),
    ],
)
def test_each_changed_setting_is_refused_by_name_and_nothing_is_touched(tmp_path, field, change, shown):
    build(tmp_path / "index")
    before = hashes(tmp_path)
    found = difference(draft(), draft(**change))
    assert [one.field for one in found] == [field]
    assert found[0].new.startswith(shown)
    with pytest.raises(IndexMismatch, match="--overwrite") as refusal:
        build(tmp_path / "index", **change)
    assert f"  {field}" in str(refusal.value)
    assert hashes(tmp_path) == before


def test_a_name_or_a_path_alone_is_no_difference(tmp_path):
    build(tmp_path / "index")
    before = hashes(tmp_path)
    moved = ModelIdentity(name="/elsewhere/tiny", fingerprint="m" * 64)
    assert difference(draft(), draft(model=moved)) == []
    assert build(tmp_path / "index", model=moved) == []
    assert hashes(tmp_path) == before


def test_what_a_shard_must_be_does_not_depend_on_names_or_later_stages(tmp_path):
    build(tmp_path / "index")
    before = expect_shards(read_manifest(tmp_path / "index"))
    longer, _ = planned(tmp_path / "index", 90, append=True)
    assert expect_shards(longer)[: len(before)] == before
    assert len({one.input for one in expect_shards(longer)}) == len(longer.shard_rows)


def test_a_manifest_of_a_later_version_is_refused(tmp_path):
    publish_manifest(tmp_path, planned(tmp_path)[0])
    raw = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(raw | {"format": 2}))
    with pytest.raises(UserError, match="has format 2"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', "\x00" * 50])
def test_a_torn_manifest_is_called_corrupt(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(CorruptFile, match="does not read as an index manifest"):
        read_manifest(tmp_path)


def test_of_two_processes_that_begin_an_index_the_second_must_agree(tmp_path):
    publish_manifest(tmp_path, planned(tmp_path / "none")[0])
    publish_manifest(tmp_path, planned(tmp_path / "none")[0])
    with pytest.raises(IndexMismatch, match="seed"):
        publish_manifest(tmp_path, planned(tmp_path / "none", seed=5)[0])
