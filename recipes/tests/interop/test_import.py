import json
import os
import pickle

import numpy as np
import pytest
import torch
from tests.indexes.synthetic import build, gradient_rows
from tests.workshop import furnish, write_rows

from vestige import attribute
from vestige.compress import compress_gradient, parse_spec
from vestige.errors import DataError, IndexMismatch, NonFinite, SpecError, UserError
from vestige.indexes import Index, export_index, index
from vestige.runs import Scores
from vestige_recipes.interop import import_published

LAYERS = 12


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setenv("VESTIGE_QUIET", "")


def projections(folder, numbers=range(4), rows=3, dtype=torch.float32):
    """The published layout by hand: 12 layers of different widths, laid out by sorted name, listed in module order."""
    names = [f"h.{layer}.mlp" for layer in range(LAYERS)]
    widths = {name: layer % 3 + 2 for layer, name in enumerate(names)}
    slices, start = {}, 0
    for name in sorted(names):
        slices[name] = (start, start + widths[name])
        start += widths[name]
    layers = [
        {"name": name, "type": "Linear", "k_i": widths[name], "k_o": 1, "k_total": widths[name], "n_o": 6, "n_i": 5}
        | {"slice_start": slices[name][0], "slice_end": slices[name][1]}
        for name in names
    ]
    folder.mkdir()
    metadata = {"engine": "GradProjLora", "proj_seed": 42, "proj_dtype": str(dtype), "proj_method": "gaussian"}
    metadata |= {"proj_rank_total": 4, "proj_rank_min": 1, "total_proj_dim": start, "layers": layers}
    (folder / "metadata.json").write_text(json.dumps(metadata))
    generator, blocks = torch.Generator().manual_seed(0), {}
    for number in numbers:
        blocks[number] = torch.randn(rows, start, generator=generator).to(dtype)
        content = {"proj": blocks[number], "iter": number, "batch_size": rows, "batch_idx": [7] * rows}
        torch.save(content, folder / f"proj_iter_{number:06d}.pt")
    return blocks, slices


def chunks(folder, counts=((4, 4), (4, 3)), dims=(3, 2)):
    """The published layout by hand: two chunks of two batches, float32."""
    grad = folder / "grad"
    grad.mkdir(parents=True)
    generator, batch, blocks = np.random.default_rng(0), 0, []
    for sizes in counts:
        values = generator.standard_normal((sum(sizes), sum(dims))).astype(np.float32)
        entries, start = [], 0
        for at, size in enumerate(sizes):
            entries.append({"batch_idx": batch + at, "start_row": start, "end_row": start + size})
            start += size
        stem = f"chunk_gradients_{batch}_{batch + len(sizes) - 1}"
        values.tofile(grad / f"{stem}.mmap")
        content = {"shape": list(values.shape), "storage_dtype": "float32", "layer_dims": list(dims)}
        (grad / f"{stem}_metadata.json").write_text(json.dumps(content | {"batches": entries}))
        blocks.append(values)
        batch += len(sizes)
    summary = {"batch_info": [], "layer_names": ["b.attn", "a.mlp"], "layer_dims": list(dims)}
    (folder / "batch_metadata.json").write_text(json.dumps(summary))
    return np.concatenate(blocks)


def test_logged_products_are_added_up_over_the_steps_by_the_tokens_of_each_example(tmp_path):
    rows = torch.arange(12).reshape(4, 3)
    steps = [([0, 1], [0.5, -1.0]), ([2, 0], [2.0, 0.25]), ([1, 2], [-1.0, 1.0])]
    entries = [
        {"dot_product": torch.tensor(values), "X_train": rows[chosen], "iter_num": 0} for chosen, values in steps
    ]
    (tmp_path / "logs").mkdir()
    torch.save(entries[:2], tmp_path / "logs" / "dot_prod_log_iter_10.pt")
    torch.save(entries[2:], tmp_path / "logs" / "dot_prod_log_iter_-1.pt")
    # A row of the data has the token after the last as well, which is only predicted.
    data = write_rows(
        tmp_path / "data.jsonl", [{"id": f"r{n}", "input_ids": [*row, 99]} for n, row in enumerate(rows.tolist())]
    )
    run = import_published(source=tmp_path / "logs", data=str(data), out=tmp_path / "run")
    assert [(row.example_id, row.score) for row in run.top(0, 3)] == [("r2", 3.0), ("r0", 0.75), ("r3", 0.0)]
    assert run.bottom(0, 1)[0].score == -2.0
    alone = import_published(source=tmp_path / "logs", out=tmp_path / "alone")
    assert alone.top(0, 1)[0].text == "tokens 6 7 8"
    write_rows(tmp_path / "data.jsonl", [{"id": "other", "input_ids": [7, 7, 7]}])
    with pytest.raises(DataError, match=r"begins with the tokens \(\d+, \d+, \d+\) is no row"):
        import_published(source=tmp_path / "logs", data=str(data), out=tmp_path / "no")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_projections_become_rows_in_the_order_of_iterations_with_their_format_kept(tmp_path, dtype):
    blocks, _ = projections(tmp_path / "p", dtype=dtype)
    made = import_published(source=tmp_path / "p", out=tmp_path / "idx")
    assert made.manifest.dtype == str(dtype).removeprefix("torch.")
    assert torch.equal(made.gradients_of(range(12)), torch.cat(list(blocks.values())).float())
    assert [example.id for example in made.examples()][:4] == ["0:0", "0:1", "0:2", "1:0"]
    assert made.verify() == []


def test_columns_come_from_the_slices_and_not_from_any_order_of_names(tmp_path):
    """ghost-engines B4.4: sorted as text, layer 10 lies before layer 2."""
    blocks, slices = projections(tmp_path / "p")
    made = import_published(source=tmp_path / "p", out=tmp_path / "idx")
    assert len(made.manifest.components) == LAYERS
    everything, stored = torch.cat(list(blocks.values())), made.gradients_of(range(12))
    for number, part in enumerate(made.manifest.components):
        assert torch.equal(stored[:, made.columns(number)], everything[:, slice(*slices[part.name])]), part.name


def test_batch_idx_is_not_believed_and_that_is_said(tmp_path, capfd):
    projections(tmp_path / "p")
    made = import_published(source=tmp_path / "p", out=tmp_path / "idx")
    assert "batch_idx" in capfd.readouterr().err
    assert "batch_idx" in made.manifest.imported.notes[0]


def test_rows_are_the_examples_of_the_data_and_the_lengths_are_compared(tmp_path):
    projections(tmp_path / "p")
    data = [{"id": f"e{row}", "text": f"text {row}"} for row in range(12)]
    made = import_published(source=tmp_path / "p", out=tmp_path / "idx", data=data)
    assert [example.id for example in made.examples()] == [f"e{row}" for row in range(12)]
    with pytest.raises(DataError, match=r"holds 12 rows, and .* 11 examples"):
        import_published(source=tmp_path / "p", out=tmp_path / "other", data=data[:11])
    assert not (tmp_path / "other").exists()


def test_missing_iterations_are_listed(tmp_path, capfd):
    """ghost-engines B4.5: a save interval of 3 loses two of three batches."""
    projections(tmp_path / "p", numbers=(0, 3, 6))
    made = import_published(source=tmp_path / "p", out=tmp_path / "idx")
    assert made.rows == 9
    assert "4 iterations are missing between the others: 1, 2, 4, 5. Every 3th iteration" in capfd.readouterr().err
    with pytest.raises(DataError, match="4 iterations are missing"):
        import_published(source=tmp_path / "p", out=tmp_path / "o", data=[{"text": f"{row}"} for row in range(21)])


class _Evil:
    def __reduce__(self):
        return os.system, ("touch hacked",)


def test_a_file_with_code_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    projections(tmp_path / "p")
    (tmp_path / "p" / "proj_iter_000002.pt").write_bytes(pickle.dumps({"proj": _Evil()}))
    with pytest.raises(DataError, match=r"proj_iter_000002.pt"):
        import_published(source=tmp_path / "p", out=tmp_path / "idx")
    assert not (tmp_path / "hacked").exists()
    assert not (tmp_path / "idx").exists()


@pytest.mark.parametrize("size", [0, 300])
def test_a_torn_file_is_named(tmp_path, size):
    projections(tmp_path / "p")
    path = tmp_path / "p" / "proj_iter_000003.pt"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DataError, match=r"proj_iter_000003.pt"):
        import_published(source=tmp_path / "p", out=tmp_path / "idx")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"iter": 9}, "says that it is iteration 9"),
        ({"batch_size": 8}, "says batch_size 8: it is not whole"),
        ({"proj": torch.zeros(3, 5)}, r"expected \[rows, "),
    ],
)
def test_a_file_that_does_not_fit_is_named(tmp_path, change, message):
    projections(tmp_path / "p")
    path = tmp_path / "p" / "proj_iter_000001.pt"
    torch.save(torch.load(path, weights_only=True) | change, path)
    with pytest.raises(DataError, match=rf"proj_iter_000001.pt.*{message}"):
        import_published(source=tmp_path / "p", out=tmp_path / "idx")


def test_metadata_missing_torn_or_with_overlapping_slices_are_named(tmp_path):
    projections(tmp_path / "p")
    path = tmp_path / "p" / "metadata.json"
    content = json.loads(path.read_text())
    content["layers"][0]["slice_start"] += 1
    content["layers"][0]["k_total"] -= 1
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"metadata.json: the slice of layer h.0.mlp is 1:2, expected one that begins"):
        import_published(source=tmp_path / "p", out=tmp_path / "idx")
    path.write_text(json.dumps(content)[:100])
    with pytest.raises(DataError, match=r"metadata.json does not read as JSON"):
        import_published(source=tmp_path / "p", out=tmp_path / "idx")
    path.unlink()
    with pytest.raises(DataError, match=r"metadata.json is missing"):
        import_published(source=tmp_path / "p", out=tmp_path / "idx")


def test_a_number_that_is_not_finite_names_its_row(tmp_path):
    projections(tmp_path / "p")
    path = tmp_path / "p" / "proj_iter_000001.pt"
    content = torch.load(path, weights_only=True)
    content["proj"][2, 0] = torch.nan
    torch.save(content, path)
    with pytest.raises(NonFinite, match="1:2"):
        import_published(source=tmp_path / "p", out=tmp_path / "idx")


def test_full_gradients_are_read_by_their_slices(tmp_path):
    folder = tmp_path / "f"
    folder.mkdir()
    slices = {
        "w": {"start": 0, "end": 6, "numel": 6, "shape": [2, 3]},
        "b": {"start": 6, "end": 8, "numel": 2, "shape": [2]},
    }
    (folder / "fullgrad_meta.json").write_text(json.dumps({"total_param_dim": 8, "param_slices": slices}))
    rows = torch.randn(3, 8)
    for number, row in enumerate(rows):
        torch.save({"grad": row.clone(), "iter": number, "batch_size": 1}, folder / f"fullgrad_iter_{number:06d}.pt")
    made = import_published(source=folder, out=tmp_path / "idx")
    assert torch.equal(made.gradients_of(range(3)), rows)
    assert [part.shape for part in made.manifest.components] == [(2, 3), (2, 1)]


def test_chunks_become_rows_in_the_order_of_batches_and_layers_keep_theirs(tmp_path):
    values = chunks(tmp_path / "c")
    made = import_published(source=tmp_path / "c", out=tmp_path / "idx")
    assert np.array_equal(made.gradients_of(range(15)).numpy(), values)
    assert [(part.name, part.start, part.stop) for part in made.manifest.components] == [
        ("b.attn", 0, 3),
        ("a.mlp", 3, 5),
    ]


@pytest.mark.parametrize("keep", [0.0, 0.5])
def test_a_chunk_that_is_not_whole_is_named(tmp_path, keep):
    """GraSS 9: metadata are written before the data, so they vouch for nothing."""
    chunks(tmp_path / "c")
    path = tmp_path / "c" / "grad" / "chunk_gradients_2_3.mmap"
    path.write_bytes(path.read_bytes()[: int(keep * 140)])
    with pytest.raises(DataError, match=r"chunk_gradients_2_3.mmap has .* expected 140 .*not whole"):
        import_published(source=tmp_path / "c", out=tmp_path / "idx")
    path.unlink()
    with pytest.raises(DataError, match=r"chunk_gradients_2_3.mmap is missing"):
        import_published(source=tmp_path / "c", out=tmp_path / "idx")


def test_a_batch_of_zeros_was_never_written(tmp_path):
    """GraSS 9: a preallocated map reads back as zeros after a kill."""
    values = chunks(tmp_path / "c")
    values[11:] = 0
    values[8:].tofile(tmp_path / "c" / "grad" / "chunk_gradients_2_3.mmap")
    with pytest.raises(
        DataError, match=r"chunk_gradients_2_3.mmap: all 3 rows of batch 3 are zero|all 4 rows of batch 3"
    ):
        import_published(source=tmp_path / "c", out=tmp_path / "idx")


def test_a_torn_final_metadata_file_is_named_and_nothing_is_read_before_it(tmp_path):
    """dattri-llm 4: after a torn last line, the rows before it were taken for all there are."""
    chunks(tmp_path / "c")
    path = tmp_path / "c" / "grad" / "chunk_gradients_2_3_metadata.json"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(DataError, match=r"chunk_gradients_2_3_metadata.json does not read as JSON"):
        import_published(source=tmp_path / "c", out=tmp_path / "idx")
    assert not (tmp_path / "idx").exists()


def test_a_missing_chunk_in_between_is_listed(tmp_path, capfd):
    chunks(tmp_path / "c", counts=((2, 2), (2, 2), (2, 2)))
    for path in (tmp_path / "c" / "grad").glob("chunk_gradients_2_3*"):
        path.unlink()
    made = import_published(source=tmp_path / "c", out=tmp_path / "idx")
    assert made.rows == 8
    assert "2 batches are missing: 2, 3" in capfd.readouterr().err


@pytest.mark.parametrize("to", ["projections", "chunks"])
def test_what_was_exported_is_imported_with_equal_gradients(tmp_path, to):
    build(tmp_path / "idx", dtype="float32")
    export_index(Index.open(tmp_path / "idx"), tmp_path / "out", to)
    made = import_published(source=tmp_path / "out", out=tmp_path / "again")
    assert torch.equal(made.gradients_of(range(60)), gradient_rows(np.arange(60)))
    assert made.manifest.components == Index.open(tmp_path / "idx").manifest.components
    # An import can itself be exported and imported.
    export_index(made, tmp_path / "out2", to)
    third = import_published(source=tmp_path / "out2", out=tmp_path / "third")
    assert torch.equal(third.gradients_of(range(60)), gradient_rows(np.arange(60)))


def test_an_import_interrupted_or_of_other_files_is_continued_or_refused(tmp_path):
    projections(tmp_path / "p")
    projections(tmp_path / "q", numbers=range(1, 5))
    made = import_published(source=tmp_path / "p", out=tmp_path / "idx")
    (tmp_path / "idx" / "shards" / "00000.json").unlink()
    assert import_published(source=tmp_path / "p", out=tmp_path / "idx").fingerprint == made.fingerprint
    with pytest.raises(IndexMismatch):
        import_published(source=tmp_path / "q", out=tmp_path / "idx")
    assert import_published(source=tmp_path / "q", out=tmp_path / "idx", overwrite=True).rows == 12


def test_scores_between_imported_queries_and_an_imported_index(tmp_path):
    blocks, _ = projections(tmp_path / "p")
    projections(tmp_path / "q", numbers=(0, 1))
    import_published(source=tmp_path / "p", out=tmp_path / "idx")
    everything = torch.cat(list(blocks.values())).double()
    scores = import_published(source=tmp_path / "q", out=tmp_path / "run", against=tmp_path / "idx", k=3)
    expected = everything[:6] @ everything.T
    for query in range(6):
        best = expected[query].argsort(descending=True)[:3]
        assert [row.row for row in scores.top(query, 3)] == best.tolist()
        assert [row.score for row in scores.top(query, 3)] == pytest.approx(expected[query][best].tolist(), rel=1e-5)
    cosines = import_published(source=tmp_path / "q", out=tmp_path / "cos", against=tmp_path / "idx", method="grad-cos")
    assert cosines.top(0, 1)[0].score == pytest.approx(1.0, abs=1e-6)
    chunks(tmp_path / "c")
    with pytest.raises(IndexMismatch, match="layers of the files and those of"):
        import_published(source=tmp_path / "c", out=tmp_path / "no", against=tmp_path / "idx")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    folder = furnish(tmp_path_factory.mktemp("workshop") / "w")
    torch.set_num_threads(1)
    index(
        model=str(folder / "tiny-model"), data=str(folder / "train.jsonl"), out=folder / "idx",
        components=("mlp",), compress="logra:4x4", dtype="float32",
    )  # fmt: skip
    return folder


def test_the_projection_rebuilt_from_the_metadata_gives_what_is_stored(workshop, tmp_path):
    """ghost-engines B4.4 and B5: seeds that follow another order than the metadata cannot be rebuilt from them."""
    model, data = str(workshop / "tiny-model"), str(workshop / "train.jsonl")
    export_index(Index.open(workshop / "idx"), tmp_path / "p", "projections")
    metadata = json.loads((tmp_path / "p" / "metadata.json").read_text())
    exact = index(model=model, data=data, out=tmp_path / "exact", components=("mlp",), compress="none", dtype="float32")
    stored = torch.load(tmp_path / "p" / "proj_iter_000000.pt", weights_only=True)["proj"]
    gradients = exact.gradients_of(range(len(stored)))
    whole = {part.name: exact.columns(number) for number, part in enumerate(exact.manifest.components)}
    spec = parse_spec(metadata["proj_method"])
    for layer in metadata["layers"]:
        shape = layer["n_o"], layer["n_i"]
        compressor = spec.build(layer["name"], shape, metadata["proj_seed"])
        rebuilt = compress_gradient(compressor, gradients[:, whole[layer["name"]]].view(-1, *shape))
        assert (layer["k_o"], layer["k_i"]) == (4, 4)
        torch.testing.assert_close(stored[:, layer["slice_start"] : layer["slice_end"]], rebuilt, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_an_export_of_our_own_can_be_asked_again_and_a_foreign_one_says_why_not(workshop, tmp_path):
    model, data = str(workshop / "tiny-model"), str(workshop / "train.jsonl")
    export_index(Index.open(workshop / "idx"), tmp_path / "p", "projections")
    import_published(source=tmp_path / "p", out=tmp_path / "own", model=model, data=data)
    ask = {"queries": ["Why is the sky blue?"], "method": "grad-dot", "model": model, "trust": False}
    before = attribute(index=workshop / "idx", out=tmp_path / "r1", **ask)
    after = attribute(index=tmp_path / "own", out=tmp_path / "r2", **ask)
    assert [(row.example_id, row.score) for row in before.top(0, 12)] == [
        (row.example_id, row.score) for row in after.top(0, 12)
    ]
    import_published(source=tmp_path / "p", out=tmp_path / "foreign", data=data)
    with pytest.raises(IndexMismatch, match="--against"):
        attribute(index=tmp_path / "foreign", out=tmp_path / "r3", **ask)
    lexical = attribute(index=tmp_path / "foreign", out=tmp_path / "r4", queries=["sky blue"], method="bm25")
    assert lexical.top(0, 1)[0].example_id == "pair-0"


def test_a_model_without_the_layers_is_refused(workshop, tmp_path):
    projections(tmp_path / "p")
    with pytest.raises(IndexMismatch, match=r"has no layer h.0.mlp"):
        import_published(source=tmp_path / "p", out=tmp_path / "idx", model=str(workshop / "tiny-model"))


COSINES = {"q1": {"b": 0.25, "a": 0.5, "c": 0.5}, "q2": {"c": -0.1, "a": 0.0}}


def test_similarities_become_a_run_that_keeps_the_order_of_equal_scores(tmp_path):
    (tmp_path / "s.json").write_text(json.dumps(COSINES, indent=4))
    data = write_rows(tmp_path / "d.jsonl", [{"id": name, "text": f"text of {name}"} for name in "cba"])
    run = import_published(source=tmp_path / "s.json", out=tmp_path / "run", data=str(data))
    assert [(row.example_id, row.score, row.text) for row in run.top("q1")] == [
        ("a", 0.5, "text of a"),
        ("c", 0.5, "text of c"),
        ("b", 0.25, "text of b"),
    ]
    assert [row.example_id for row in Scores.open(tmp_path / "run").bottom("q2")] == ["c", "a"]
    assert run.run.trust.checks[0].verdict == "unknown"


def test_a_level_of_dimensions_is_chosen(tmp_path):
    other = {"q1": {"a": 1.0}}
    (tmp_path / "s.json").write_text(json.dumps({"512": COSINES, "1024": other}))
    with pytest.raises(SpecError, match=r"has the dimensions 512, 1024. Pass dimension=512"):
        import_published(source=tmp_path / "s.json", out=tmp_path / "run")
    run = import_published(source=tmp_path / "s.json", out=tmp_path / "run", dimension=1024)
    assert run.top("q1")[0].score == 1.0


def test_products_per_parameter_become_cosines_that_are_split(tmp_path):
    folder = tmp_path / "full"
    folder.mkdir()
    dots = {"q": {"a": {"w": 3.0, "v": 1.0}, "b": {"w": -1.0, "v": 0.0}}}
    (folder / "dot_products.json").write_text(json.dumps(dots))
    raw = import_published(source=folder, out=tmp_path / "raw")
    assert [(row.example_id, row.score) for row in raw.top(0)] == [("a", 4.0), ("b", -1.0)]
    (folder / "paraphrased_dot_products.json").write_text(json.dumps({"q": {"w": 4.0, "v": 0.0}}))
    (folder / "original_dot_products.json").write_text(
        json.dumps({"a": {"w": 9.0, "v": 16.0}, "b": {"w": 1.0, "v": 0}})
    )
    run = import_published(source=folder, out=tmp_path / "cos")
    assert [row.score for row in run.top(0)] == pytest.approx([0.4, -0.5])
    assert [(part.component, part.score) for part in run.components(0, "a")] == [
        ("w", pytest.approx(0.3)),
        ("v", pytest.approx(0.1)),
    ]


def test_products_in_partitions_become_the_cosines_of_the_whole(tmp_path):
    folder = tmp_path / "parts"
    folder.mkdir()
    of_query = {"q": {"a": {"w": 3.0, "v": 1.0}}, "r": {"a": {"w": -1.0, "v": 0.0}}}
    for number, (query, candidates) in enumerate(of_query.items()):
        parts = {"dot_products": {query: candidates}, "paraphrased_dot_products": {query: {"w": 4.0, "v": 0.0}}}
        parts["original_dot_products"] = {"a": {"w": 9.0, "v": 16.0}}
        for stem, content in parts.items():
            (folder / f"{stem}_part_{number}_{number + 1}.json").write_text(json.dumps(content))
    run = import_published(source=folder, out=tmp_path / "cos")
    assert run.queries == ["q", "r"]
    assert [run.top(query)[0].score for query in "qr"] == pytest.approx([0.4, -0.1])


def test_partitions_are_joined_and_a_query_in_two_is_refused(tmp_path):
    (tmp_path / "x_part_0_1.json").write_text(json.dumps({"q1": {"a": 1.0}}))
    (tmp_path / "x_part_1_2.json").write_text(json.dumps({"q2": {"a": 0.5}}))
    assert import_published(source=tmp_path, out=tmp_path / "run").queries == ["q1", "q2"]
    (tmp_path / "x_part_1_3.json").write_text(json.dumps({"q2": {"a": 0.5}}))
    with pytest.raises(DataError, match=r"x_part_1_3.json holds queries that another partition has too: q2"):
        import_published(source=tmp_path, out=tmp_path / "run2")


@pytest.mark.parametrize("content", ['{"q": {"a": 1.0}', '{"q": {"a": "x"}}', "[1, 2]", "{}", '{"q": {}}'])
def test_broken_similarities_name_the_file(tmp_path, content):
    (tmp_path / "s.json").write_text(content)
    with pytest.raises(DataError, match=r"s\.json"):
        import_published(source=tmp_path / "s.json", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_is_no_known_layout_is_said(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        import_published(source=tmp_path / "nowhere", out=tmp_path / "idx")
    with pytest.raises(UserError, match="no file of a known layout"):
        import_published(source=tmp_path, out=tmp_path / "idx")
