"""Each row of an index is the gradient of the example whose id it carries, whatever the plan did to the order."""

import errno
import json
import os
import shutil
import time
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import vestige.evaluate
from tests.indexes.synthetic import build
from tests.workshop import PAIRS, furnish, write_rows
from vestige.compress import MaskPart, MaskTraining, Stream, train_selective_mask, write_masks
from vestige.errors import IndexMismatch, UserError
from vestige.indexes import Index, index_status


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    torch.set_num_threads(1)
    return furnish(tmp_path_factory.mktemp("workshop") / "w")


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def indexed(workshop, data, out, **given):
    settings = {"components": ("mlp",), "dtype": "float32", "compress": "logra:4x4"} | given
    return vestige.index(model=str(workshop / "tiny-model"), data=str(data), out=out, **settings)


def rows() -> list[dict[str, Any]]:
    """Texts of uneven lengths, in no order of them, each under an id that says nothing; two of them are equal."""
    made: list[dict[str, Any]] = [
        {"id": f"{7 * number % 12:02d}-x", "text": " ".join(pair[:2])} for number, pair in enumerate(PAIRS)
    ]
    for number, row in enumerate(made):
        row["text"] += " and so on" * (5 * number % 7)
    return [*made, {"id": "again", "text": made[4]["text"]}]


@pytest.mark.slow
def test_trap_a_row_leads_back_to_its_example(workshop, tmp_path):
    """Elsewhere rows were drawn with replacement and numbered by a counter: none could be traced to its data."""
    examples = rows()
    data = write_rows(tmp_path / "train.jsonl", examples)
    whole = indexed(workshop, data, tmp_path / "whole", token_budget=150)
    assert [example.id for example in whole.examples()] == [row["id"] for row in examples]
    assert len(whole.manifest.shard_rows) > 2
    stored = [block.example for block in whole.blocks()]
    assert torch.cat(stored).tolist() != list(range(13)), "the plan kept the order of the data: nothing is shown"
    for number in (0, 5, 12):
        one = write_rows(tmp_path / f"{number}.jsonl", [examples[number]])
        alone = indexed(workshop, one, tmp_path / f"alone-{number}")
        assert alone.examples()[0].id == examples[number]["id"]
        torch.testing.assert_close(whole.gradients_of([number]), alone.gradients_of([0]), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_dattri_llm_2_equal_texts_are_rows_of_their_own(workshop, tmp_path):
    """A peer names examples by the hash of their text: nine became eight, and the output fitted no data set."""
    data = write_rows(tmp_path / "train.jsonl", rows())
    whole = indexed(workshop, data, tmp_path / "whole", token_budget=150)
    first, second = whole.gradients_of([4, 12])
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
    scores = vestige.attribute(
        index=tmp_path / "whole",
        queries=["Who wrote Emma?"],
        out=tmp_path / "run",
        method="grad-dot",
        k=13,
        trust=False,
    )
    listed = {row.example_id: row.score for row in scores.top(0, 13)}
    assert len(listed) == 13
    assert listed["again"] == pytest.approx(listed[rows()[4]["id"]], rel=1e-4)


@pytest.mark.slow
def test_dattri_6_nothing_is_left_in_the_current_folder(workshop, tmp_path, elsewhere):
    """A peer writes its metadata into the current folder and reads those of another data set there."""
    (elsewhere / "batch_metadata.json").write_text(json.dumps({"batch_info": [], "layer_names": []}))
    indexed(workshop, workshop / "train.jsonl", tmp_path / "idx")
    for method, given in (("influence", {}), ("grad-dot", {"dense": True})):
        vestige.attribute(
            index=tmp_path / "idx",
            queries=["Why?"],
            out=tmp_path / f"run-{method}",
            method=method,
            trust=False,
            **given,
        )
    assert [path.name for path in elsewhere.iterdir()] == ["batch_metadata.json"]


@pytest.mark.slow
def test_grass_2_masks_are_trained_on_gradients_of_the_model_that_is_explained(workshop, tmp_path):
    """A peer trained its masks on random weights: no checkpoint was ever loaded."""
    data = workshop / "train.jsonl"
    exact = indexed(workshop, data, tmp_path / "exact", compress="none")
    masks, columns = {}, []
    for component in exact.manifest.components:
        place, shape = slice(component.start, component.stop), component.shape
        gradients = exact.gradients_of(range(exact.rows))[:, place].view(-1, *shape)
        parts = train_selective_mask(gradients, (4, 4), Stream(0, component.name), MaskTraining(epochs=3)).parts
        masks[component.name] = {side: MaskPart(part.coordinates, part.size, 1.0) for side, part in parts.items()}
        kept = [parts[side].coordinates for side in ("left", "right")]
        columns.append(gradients[:, kept[0]][:, :, kept[1]].flatten(1))
    write_masks(tmp_path / "masks.safetensors", masks)
    masked = indexed(workshop, data, tmp_path / "masked", compress=f"selective:4x4,file={tmp_path}/masks.safetensors")
    assert masked.manifest.model.fingerprint == exact.manifest.model.fingerprint
    torch.testing.assert_close(masked.gradients_of(range(exact.rows)), torch.cat(columns, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("healthy", [0, 7])
def test_grass_9_a_writer_that_fails_is_an_error_within_seconds(tmp_path, monkeypatch, healthy):
    """A peer only logged what its writer threads raised, and waited for the chunk for ever."""
    real, left = os.fsync, [healthy]

    def broken(descriptor):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.EIO, "Input/output error")
        real(descriptor)

    build(tmp_path / "index", shard=(0, 2))
    before = index_status(tmp_path / "index").done
    begun = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", broken)
        with pytest.raises(UserError, match=r"Input/output error.*When the disk is back"):
            build(tmp_path / "index")
    assert time.monotonic() - begun < 10
    assert left[0] < 0
    assert before <= index_status(tmp_path / "index").done < index_status(tmp_path / "index").total
    assert not list((tmp_path / "index").rglob("*.tmp.*"))
    build(tmp_path / "index")
    assert Index.open(tmp_path / "index").verify() == []


def test_trap_gradients_of_other_weights_are_not_compared(workshop, tmp_path):
    """Elsewhere the exact reference of the projections came from other random weights, and nothing noticed."""
    data = str(workshop / "train.jsonl")
    indexed(workshop, data, tmp_path / "idx")
    other = tmp_path / "other-model"
    shutil.copytree(workshop / "tiny-model", other)
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"][0] += 0.5
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(IndexMismatch, match="another model"):
        vestige.attribute(
            index=tmp_path / "idx", model=str(other), queries=["Why?"], out=tmp_path / "run", method="grad-dot"
        )
    with pytest.raises(IndexMismatch, match="another model"):
        vestige.evaluate.sketch(
            model=str(other), data=data, index=str(tmp_path / "idx"), compress=(), out=tmp_path / "sketch", num_ref=4
        )
