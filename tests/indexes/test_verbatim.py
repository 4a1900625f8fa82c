"""The search for verbatim text is kept with an index: whole or absent, built again where it does not fit the data."""

import numpy as np
import pytest
import torch

import vestige
from tests.workshop import PAIRS, furnish, write_rows
from vestige.data import tokenize_source
from vestige.errors import DiskSpaceError
from vestige.indexes import VERBATIM, open_search
from vestige.models import load_model


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    torch.set_num_threads(1)
    return furnish(tmp_path_factory.mktemp("verbatim"))


@pytest.fixture(scope="module")
def loaded(place):
    return load_model(str(place / "tiny-model"))


def tokens_of(loaded, data, **options):
    return tokenize_source(str(data), loaded.tokenizer, max_length=96, name="data", **options)


def spans_of(search, text):
    return [(span.start, span.stop, span.occurrences, span.places) for span in search.find(text, 2)]


def test_parts_are_searched_as_one_and_stay_as_they_are(place, loaded, tmp_path):
    data = tokens_of(loaded, place / "train.jsonl")
    whole = open_search(tmp_path / "whole", data, loaded.vocabulary)
    parts = open_search(tmp_path / "parts", data, loaded.vocabulary, part_tokens=30)
    assert whole.tokens == parts.tokens == sum(map(len, data.input_ids))
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 4
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").iterdir()}
    for row in range(len(data)):
        found = spans_of(whole, data.input_ids[row])
        assert found == spans_of(parts, data.input_ids[row])
        assert found[0][:2] == (0, len(data.input_ids[row]))
        assert found[0][3][0] == (row, 0)
    open_search(tmp_path / "parts", data, loaded.vocabulary, part_tokens=30)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").iterdir()} == before


def test_a_part_that_is_missing_or_damaged_is_built_again_and_no_other(place, loaded, tmp_path):
    data = tokens_of(loaded, place / "train.jsonl")
    folder = tmp_path / "parts"
    open_search(folder, data, loaded.vocabulary, part_tokens=30)
    content = {path.name: path.read_bytes() for path in folder.iterdir()}
    # Killed before the marker, and a byte that changed on the disk.
    (folder / "00001.json").unlink()
    (folder / "00003.safetensors").write_bytes(content["00003.safetensors"][:-1] + b"x")
    kept = (folder / "00002.safetensors").stat().st_mtime_ns
    search = open_search(folder, data, loaded.vocabulary, part_tokens=30)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == content
    assert (folder / "00002.safetensors").stat().st_mtime_ns == kept
    assert spans_of(search, data.input_ids[5])[0][3] == ((5, 0),)


@pytest.mark.slow
def test_one_that_was_built_from_other_rows_does_not_count(place, loaded, tmp_path, capfd):
    rows = [{"text": f"{prompt} {answer}"} for prompt, answer, _ in PAIRS]
    write_rows(tmp_path / "rows.jsonl", rows)
    words = {"model": str(place / "tiny-model"), "data": str(tmp_path / "rows.jsonl"), "out": tmp_path / "idx"}
    vestige.index(**words)
    shards = {path.name: path.read_bytes() for path in (tmp_path / "idx" / "shards").iterdir()}
    vestige.index(**words, verbatim=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "idx" / "shards").iterdir()} == shards
    assert "tokens are sorted" in capfd.readouterr().err
    data = tokens_of(loaded, tmp_path / "rows.jsonl")
    folder, new = tmp_path / "idx" / VERBATIM, "Zebras have stripes, and no two have the same."
    text = loaded.tokenizer(new)["input_ids"]
    assert max(span.stop - span.start for span in open_search(folder, data, loaded.vocabulary).find(text, 1)) < len(
        text
    )
    write_rows(tmp_path / "rows.jsonl", [*rows, {"text": new}])
    vestige.index(**words, append=True, verbatim=True)
    assert "tokens are sorted" in capfd.readouterr().err
    data = tokens_of(loaded, tmp_path / "rows.jsonl")
    (span, *_) = open_search(folder, data, loaded.vocabulary).find(text, 4)
    assert (span.start, span.stop, span.places) == (0, len(text), ((len(PAIRS), 0),))
    vestige.index(**words, overwrite=True)
    assert not folder.exists()


def test_a_full_disk_is_noticed_before_the_work(place, loaded, tmp_path, monkeypatch):
    data = tokens_of(loaded, place / "train.jsonl")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(DiskSpaceError, match="verbatim"):
        open_search(tmp_path / "verbatim", data, loaded.vocabulary)
    assert not (tmp_path / "verbatim").exists()


def test_token_ids_of_any_width_are_found(tmp_path, place, loaded):
    data = tokens_of(loaded, place / "train.jsonl")
    wide = open_search(tmp_path / "wide", data, None)
    assert spans_of(wide, data.input_ids[2]) == spans_of(open_search(tmp_path / "thin", data, 400), data.input_ids[2])
    sizes = [sum(path.stat().st_size for path in (tmp_path / name).glob("*.safetensors")) for name in ("thin", "wide")]
    assert sizes[1] - sizes[0] == 2 * (wide.tokens + len(data))
    assert np.array_equal(data.lengths, list(map(len, data.input_ids)))
