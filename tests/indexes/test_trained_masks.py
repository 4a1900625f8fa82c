"""`vestige index --compress selective:AxB`: the masks are trained first, and kept with the index."""

import os
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.reference.gradients import example_gradients
from tests.workshop import PAIRS, furnish, write_rows
from vestige import attribute, doctor, index
from vestige.compress import MaskTraining, Stream, permutation, read_masks, train_selective_mask
from vestige.data import load_examples, tokenize
from vestige.errors import DataError, IndexMismatch, SpecError
from vestige.indexes import Index

TRAINING = "epochs=3,check_every=1,learning_rate=0.05,examples=12"
SPEC = f"selective:4x4,{TRAINING}"


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(furnish(tmp_path / "workshop"))
    return tmp_path / "workshop"


def build(out="idx", compress=SPEC, **settings):
    settings = {"data": "train.jsonl", "dtype": "float32", "components": ("mlp",), **settings}
    return index(model="tiny-model", compress=compress, out=out, **settings)


def gradients_by_autograd(names):
    """Gradients [example, out, in] of every row's own loss, in float64, one row after another."""
    model = AutoModelForCausalLM.from_pretrained("tiny-model").double().eval()
    data = tokenize(load_examples("train.jsonl"), AutoTokenizer.from_pretrained("tiny-model"), max_length=None)
    rows = [
        example_gradients(model, torch.as_tensor(ids), torch.as_tensor(targets))
        for ids, targets in zip(data.input_ids, data.targets, strict=True)
    ]
    return {name: torch.stack([row[name] for row in rows]) for name in names}


def trained_file(folder):
    (path,) = (folder / "trained").glob("*.safetensors")
    return path


@pytest.mark.slow
def test_rows_are_the_gradients_at_the_coordinates_that_the_training_chose(place):
    made = build(components=("*.mlp.down_proj.weight",))
    (part, *_), masks = made.manifest.components, read_masks(str(trained_file(made.folder)))
    exact = gradients_by_autograd([part.name])[part.name]
    drawn = permutation(Stream(0, "trained on"), 12).sort().values
    training = MaskTraining(epochs=3, check_every=1, learning_rate=0.05, examples=12)
    expected = train_selective_mask(exact[drawn].float(), (4, 4), Stream(0, part.name, 0, "selective"), training)
    scale = 1.0
    for word, size in zip(("left", "right"), part.shape, strict=True):
        kept = masks.part(part.name, word)
        assert (kept.size, len(kept.coordinates)) == (size, 4)
        torch.testing.assert_close(kept.coordinates, expected.parts[word].coordinates)
        scale *= kept.scale
    rows = made.gradients_of(np.arange(12))[:, part.start : part.stop]
    left, right = (masks.part(part.name, word).coordinates for word in ("left", "right"))
    kept = exact[:, left][:, :, right].flatten(1) * scale
    torch.testing.assert_close(rows.double(), kept, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_the_same_command_trains_nothing_again_and_another_training_is_refused(place):
    made = build()
    path = trained_file(made.folder)
    before, spec = path.stat().st_mtime_ns, made.manifest.compression.spec
    assert "file=@trained/" in spec
    assert "digest=" in spec
    assert str(place) not in spec
    assert build().fingerprint == made.fingerprint
    with pytest.raises(IndexMismatch, match=r"epochs=4"):
        build(compress=SPEC.replace("epochs=3", "epochs=4"))
    with pytest.raises(IndexMismatch, match="seed"):
        build(seed=1)
    assert path.stat().st_mtime_ns == before
    # Killed before there was a manifest: what is trained is found again, and not taken for another seed's.
    (made.folder / "manifest.json").unlink()
    shutil.rmtree(made.folder / "shards")
    shutil.rmtree(made.folder / "examples")
    again = build()
    assert path.stat().st_mtime_ns == before
    assert again.fingerprint == made.fingerprint
    other = build(seed=1, overwrite=True)
    assert trained_file(other.folder).name != path.name


@pytest.mark.slow
def test_an_index_that_has_moved_is_queried_and_gains_rows(place):
    made = build()
    rows = [{"id": f"pair-{number}", "prompt": pair[0], "completion": pair[1], "source": pair[2]}
            for number, pair in enumerate([*PAIRS, ("What is honey?", "Bees make it.", "biology")])]  # fmt: skip
    write_rows(place / "more.jsonl", rows)
    shutil.move(made.folder, place / "elsewhere")
    os.chdir(place.parent)
    longer = index(
        model=str(place / "tiny-model"), data=str(place / "more.jsonl"), out=place / "elsewhere",
        compress=SPEC, dtype="float32", components=("mlp",), append=True,
    )  # fmt: skip
    assert longer.rows == 13
    assert longer.manifest.compression.spec == made.manifest.compression.spec
    scores = attribute(index=place / "elsewhere", queries="What do bees make?", out=place / "run", dense=True)
    assert scores.dense().shape == (1, 13)
    trained_file(place / "elsewhere").write_bytes(b"damaged")
    with pytest.raises(SpecError, match="not a file of trained masks"):
        attribute(index=place / "elsewhere", queries="What is wax?", out=place / "other")


@pytest.mark.slow
def test_two_workers_leave_the_bytes_of_one(place):
    one, two = build("one"), build("two", workers=2)
    assert trained_file(one.folder).read_bytes() == trained_file(two.folder).read_bytes()
    assert one.fingerprint == two.fingerprint


@pytest.mark.slow
def test_masks_of_whole_gradients_stand_before_a_sketch_of_the_model(place):
    made = build(compress=f"selective_grass-16,{TRAINING}", compress_scope="model")
    assert made.width == 16
    assert made.manifest.compression.spec.endswith(" | sjlt:16")
    assert Index.open("idx").spec.stages[0].size == (64,)


def test_what_cannot_be_trained_is_refused_before_anything_is_written(place):
    with pytest.raises(SpecError, match="another stage stands before it"):
        build(compress=f"mask:16x16 | selective:4x4,{TRAINING}")
    with pytest.raises(DataError, match=r"mlp\..*at least 10 examples, given 9"):
        build(compress=SPEC.replace("examples=12", "examples=9"))
    assert not (place / "idx" / "manifest.json").exists()
    with pytest.raises(SpecError, match="trained by vestige index"):
        doctor(model="tiny-model", data="train.jsonl", compress="selective:4x4")
    (place / "other").mkdir()
    (place / "other" / "notes.txt").touch()
    with pytest.raises(Exception, match="holds other files"):
        build("other")
    assert sorted(path.name for path in (place / "other").iterdir()) == ["notes.txt"]
