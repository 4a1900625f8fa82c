"""Metadata of published layouts that other hands wrote: what does not fit is named, and nothing takes for ever."""

import json
import math

import pytest
import torch

from interop.test_import import chunks, projections
from vestige.errors import DataError, UserError
from vestige_recipes.interop import import_published

DEEP = "[" * 100_000 + "]" * 100_000
ODD = ["x", None, [], {}, -1, 1.5, math.nan, math.inf, 10**30, True]
"""What is no whole number from 0."""


@pytest.mark.parametrize("value", ODD, ids=str)
@pytest.mark.parametrize("name", ["total_proj_dim", "layers", "slice_start", "slice_end", "k_total", "n_o", "n_i"])
def test_projections(name, value, tmp_path):
    projections(tmp_path / "p")
    path = tmp_path / "p" / "metadata.json"
    content = json.loads(path.read_text())
    (content if name in content else content["layers"][3])[name] = value
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"metadata\.json"):
        import_published(source=tmp_path / "p", out=tmp_path / "idx")


@pytest.mark.parametrize("value", ODD, ids=str)
@pytest.mark.parametrize("name", ["iter", "batch_size"])
def test_iterations(name, value, tmp_path):
    projections(tmp_path / "p")
    path = tmp_path / "p" / "proj_iter_000001.pt"
    torch.save(torch.load(path, weights_only=True) | {name: value}, path)
    with pytest.raises(DataError, match=r"proj_iter_000001\.pt"):
        import_published(source=tmp_path / "p", out=tmp_path / "idx")


def test_a_number_of_an_iteration_beyond_all_others_takes_no_time(tmp_path, capfd):
    projections(tmp_path / "p", numbers=(0, 1, 99_999_999_999))
    import_published(source=tmp_path / "p", out=tmp_path / "idx")
    said = "99,999,999,997 iterations are missing between the others: 2, 3, 4, 5, 6, 7, 8, 9, ..."
    assert said in capfd.readouterr().err


def test_a_number_of_batches_beyond_all_others_takes_no_time(tmp_path, capfd):
    chunks(tmp_path / "c")
    path = tmp_path / "c" / "batch_metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"total_batches": 10**12}))
    import_published(source=tmp_path / "c", out=tmp_path / "idx")
    assert "999,999,999,996 batches are missing: 4, 5, 6, " in capfd.readouterr().err


@pytest.mark.parametrize("value", ["ab", *ODD], ids=str)
@pytest.mark.parametrize("name", ["shape", "layer_dims", "storage_dtype", "batches", "start_row", "end_row"])
def test_chunks(name, value, tmp_path):
    chunks(tmp_path / "c")
    path = next((tmp_path / "c" / "grad").glob("*_metadata.json"))
    content = json.loads(path.read_text())
    (content if name in content else content["batches"][1])[name] = value
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="metadata"):
        import_published(source=tmp_path / "c", out=tmp_path / "idx")


@pytest.mark.parametrize("value", ["x", 5, [], {}, {"a": 5}, {"a": {"start": "x", "end": 3, "shape": [3]}}], ids=str)
def test_full_gradients(value, tmp_path):
    (tmp_path / "f").mkdir()
    torch.save({"grad": torch.zeros(1, 3), "iter": 0, "batch_size": 1}, tmp_path / "f" / "fullgrad_iter_000000.pt")
    content = {"param_slices": value, "total_param_dim": 3}
    (tmp_path / "f" / "fullgrad_meta.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"fullgrad_meta\.json"):
        import_published(source=tmp_path / "f", out=tmp_path / "idx")


@pytest.mark.parametrize(
    "content",
    [DEEP, "9" * 5000, '{"q": {"a": 1e999}}', f'{{"q": {{"a": {"9" * 400}}}}}', '{"q": 5}', '{"\\ud800": {"a": 1.0}}'],
)
def test_similarities(content, tmp_path):
    (tmp_path / "s.json").write_text(content)
    with pytest.raises(UserError):
        import_published(source=tmp_path / "s.json", out=tmp_path / "run")
