"""An index and a run in layouts of other software."""

import json

import numpy as np
import pytest
import torch
from tests.indexes.synthetic import COMPONENTS, WIDTH, build, gradient_rows
from tests.workshop import furnish

import vestige
from vestige import export
from vestige.curvature import precondition, read_preconditioned
from vestige.errors import SpecError
from vestige.indexes import CompressionIdentity, Index, export_index
from vestige_recipes.common.texts import byte_gpt
from vestige_recipes.interop import import_published


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "index"
    build(folder, dtype="float32")
    return Index.open(folder)


def test_projections_are_laid_out_by_sorted_name_and_cut_into_iterations(index, tmp_path):
    export_index(index, tmp_path / "out", "projections")
    metadata = json.loads((tmp_path / "out" / "metadata.json").read_text())
    assert [layer["name"] for layer in metadata["layers"]] == ["first.weight", "second.weight"]
    assert (metadata["layers"][0]["k_o"], metadata["layers"][0]["k_i"]) == (4, 4)
    files = sorted((tmp_path / "out").glob("proj_iter_*.pt"))
    assert [path.name for path in files] == [f"proj_iter_{number:06d}.pt" for number in range(4)]
    content = [torch.load(path, weights_only=True) for path in files]
    assert torch.equal(torch.cat([each["proj"] for each in content]), gradient_rows(np.arange(60)))
    assert [row for each in content for row in each["batch_idx"]] == list(range(60))


def test_the_least_rank_in_the_metadata_is_the_one_that_was_asked_for(tmp_path):
    place = furnish(tmp_path / "place")
    given = {"model": str(place / "tiny-model"), "data": str(place / "train.jsonl"), "limit": 2}
    vestige.index(**given, out=tmp_path / "idx", components="mlp", compress="logra:16,min=2")
    export_index(Index.open(tmp_path / "idx"), tmp_path / "out", "projections")
    assert json.loads((tmp_path / "out" / "metadata.json").read_text())["proj_rank_min"] == 2


@pytest.mark.slow
def test_exact_gradients_are_laid_out_as_the_published_script_does(tmp_path):
    """A GPT-2 has Conv1D weights, whose gradients the script flattens as [in, out]."""
    model = byte_gpt(16, 8, 1, 2).eval()
    rows = [{"id": f"{number}", "input_ids": list(text)} for number, text in enumerate((b"bees make honey", b"sky"))]
    vestige.index(model=model, data=rows, out=tmp_path / "idx", components="all", compress="none", dtype="float32")
    export_index(Index.open(tmp_path / "idx"), tmp_path / "out", "fullgrads")
    metadata = json.loads((tmp_path / "out" / "fullgrad_meta.json").read_text())
    for row, ids in enumerate((b"bees make honey", b"sky")):
        found = torch.load(tmp_path / "out" / f"fullgrad_iter_{row:06d}.pt", weights_only=True)
        assert (found["iter"], found["batch_size"]) == (row, 1)
        model.zero_grad()
        for weight in model.parameters():
            weight.requires_grad_(True)
        tokens = torch.tensor([list(ids)])
        loss = torch.nn.functional.cross_entropy(model(tokens).logits[0, :-1], tokens[0, 1:], reduction="sum")
        loss.backward()
        for name, place in metadata["param_slices"].items():
            gradient = model.get_parameter(name).grad
            assert list(gradient.shape) == place["shape"]
            part = found["grad"][place["start"] : place["end"]]
            torch.testing.assert_close(part, gradient.reshape(-1), rtol=1e-3, atol=1e-5)
    again = import_published(source=tmp_path / "out", out=tmp_path / "again")
    assert again.manifest.width == metadata["total_param_dim"]


def test_compressed_gradients_are_no_exact_ones(index, tmp_path):
    with pytest.raises(SpecError, match="Give an index made with --compress none"):
        export_index(index, tmp_path / "out", "fullgrads")


def test_chunks_are_raw_numbers_with_their_shape_beside(index, tmp_path):
    export_index(index, tmp_path / "out", "chunks")
    metadata = json.loads((tmp_path / "out" / "grad" / "chunk_gradients_0_3_metadata.json").read_text())
    assert metadata["shape"] == [60, WIDTH]
    assert metadata["batches"][-1] == {"batch_idx": 3, "start_row": 48, "end_row": 60}
    values = np.fromfile(tmp_path / "out" / "grad" / "chunk_gradients_0_3.mmap", dtype=np.float32)
    assert np.array_equal(values.reshape(60, WIDTH), gradient_rows(np.arange(60)).numpy())


@pytest.fixture
def run(tmp_path):
    content = {"q1": {"a": 0.5, "b": 0.25, "c": -0.125}, "q2": {"c": 1.0, "a": 0.0}}
    (tmp_path / "s.json").write_text(json.dumps(content))
    import_published(source=tmp_path / "s.json", out=tmp_path / "run")
    return content, tmp_path / "run"


def test_a_run_is_exported_to_similarities_that_import_again(run, tmp_path):
    content, folder = run
    [path] = export(path=folder, out=tmp_path / "out", to="similarities")
    assert json.loads(path.read_text()) == content
    again = import_published(source=path, out=tmp_path / "again")
    assert [row.score for row in again.top("q1")] == [0.5, 0.25, -0.125]


def test_a_layout_for_the_other_kind_is_refused(run, index, tmp_path):
    with pytest.raises(SpecError, match="is a run, and `to` chunks is for an index"):
        export(path=run[1], out=tmp_path / "out", to="chunks")
    with pytest.raises(SpecError, match="is an index, and `to` similarities is for a run"):
        export(path=index.folder, out=tmp_path / "out", to="similarities")


def test_preconditioned_gradients_are_exported_as_in_the_data_and_import_again(index, tmp_path):
    precondition(index=index.folder, out=tmp_path / "ifvp", damping=0.5)
    files = export(path=tmp_path / "ifvp", out=tmp_path / "out", to="chunks")
    assert sorted(path.name for path in files) == [
        "batch_metadata.json",
        "chunk_ifvp_0_3.mmap",
        "chunk_ifvp_0_3_metadata.json",
    ]
    values = np.fromfile(tmp_path / "out" / "ifvp" / "chunk_ifvp_0_3.mmap", dtype=np.float32).reshape(60, WIDTH)
    for block in read_preconditioned(tmp_path / "ifvp"):
        assert np.array_equal(values[block.example], block.gradients.numpy())
    assert np.abs(values - gradient_rows(np.arange(60)).numpy()).max() > 1e-3
    again = import_published(source=tmp_path / "out", out=tmp_path / "again")
    assert np.array_equal(again.gradients_of(range(60)).numpy(), values)
    with pytest.raises(SpecError, match="numpy is for an index"):
        export(path=tmp_path / "ifvp", out=tmp_path / "numbers")


def test_preconditioned_gradients_of_the_whole_model_are_one_layer(tmp_path):
    shared = tuple(part.model_copy(update={"start": 0, "stop": WIDTH}) for part in COMPONENTS)
    compression = CompressionIdentity(spec=f"sjlt:{WIDTH}", scope="model")
    build(tmp_path / "index", dtype="float32", components=shared, compression=compression)
    precondition(index=tmp_path / "index", out=tmp_path / "ifvp")
    export(path=tmp_path / "ifvp", out=tmp_path / "out", to="chunks")
    metadata = json.loads((tmp_path / "out" / "batch_metadata.json").read_text())
    assert (metadata["layer_names"], metadata["layer_dims"]) == (["all components"], [WIDTH])
