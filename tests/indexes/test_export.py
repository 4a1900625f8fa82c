import csv
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from datasets import load_from_disk
from safetensors.numpy import load_file

from tests.indexes.synthetic import WIDTH, build, gradient_rows
from tests.runs.conftest import all_scores, content, queries, record, train  # noqa: F401
from vestige import export
from vestige.errors import MissingExtra, SpecError, UserError
from vestige.indexes import Index, export_index
from vestige.registry import EXPORT_FORMATS, Registry
from vestige.runs import write_run


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "index"
    build(folder, dtype="float32")
    return Index.open(folder)


def test_numpy_arrays_hold_every_row(index, tmp_path):
    paths = export_index(index, tmp_path / "out", "numpy")
    assert sorted(paths) == sorted((tmp_path / "out").iterdir())
    example = np.load(tmp_path / "out" / "example.npy")
    assert sorted(example) == list(range(60))
    gradients = np.load(tmp_path / "out" / "gradients.npy", mmap_mode="r")
    assert np.array_equal(gradients, gradient_rows(example).numpy())
    assert np.array_equal(np.load(tmp_path / "out" / "loss.npy"), example / np.float32(8))
    norm = np.load(tmp_path / "out" / "norm.npy")
    assert np.array_equal(norm, gradient_rows(example).norm(dim=1).numpy())
    assert json.loads((tmp_path / "out" / "index.json").read_text())["compression"]["spec"] == "logra:4x4"


@pytest.mark.parametrize("to", ["arrow", "parquet"])
def test_tables_hold_every_row(index, tmp_path, to):
    [path] = export_index(index, tmp_path / "out", to)
    table = pa.ipc.open_file(path).read_all() if to == "arrow" else parquet.read_table(path)
    example = table["example"].to_numpy()
    assert sorted(example) == list(range(60))
    assert table["id"].to_pylist() == [f"e{row}" for row in example]
    gradients = np.array(table["gradient"].to_pylist(), dtype=np.float32)
    assert gradients.shape == (60, WIDTH)
    assert np.array_equal(gradients, gradient_rows(example).numpy())
    assert json.loads(table.schema.metadata[b"vestige.manifest"])["seed"] == 0


def test_an_unknown_format_or_a_full_folder_is_refused(index, tmp_path):
    with pytest.raises(SpecError, match=r"--to banana is not known for an index. Expected one of: arrow, .*\[recipes"):
        export_index(index, tmp_path / "out", "banana")
    (tmp_path / "notes").touch()
    with pytest.raises(UserError, match="not an empty folder"):
        export_index(index, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


def test_safetensors_hold_every_row_in_the_order_of_the_data(index, tmp_path):
    [path] = export_index(index, tmp_path / "out", "safetensors")
    stored = load_file(path)
    assert np.array_equal(stored["gradients"], gradient_rows(np.arange(60)).numpy())
    assert np.array_equal(stored["loss"], np.arange(60) / np.float32(8))


def test_a_datasets_folder_holds_the_examples_beside_their_gradients(index, tmp_path):
    export_index(index, tmp_path / "out", "datasets")
    rows = load_from_disk(str(tmp_path / "out"))
    assert rows["id"][:] == [f"e{row}" for row in range(60)]
    assert rows[1]["prompt"] == "question 1"
    assert json.loads(rows[0]["messages"])[1] == ["assistant", "no. 0"]
    assert np.array_equal(np.array(rows["gradient"][:], dtype=np.float32), gradient_rows(np.arange(60)).numpy())
    assert not list((tmp_path / "out").glob(".rows*"))


def test_a_faiss_index_finds_rows_and_its_recall_lies_beside_it(tmp_path, capfd):
    faiss = pytest.importorskip("faiss")
    build(tmp_path / "idx", 400, dtype="float32")
    index = Index.open(tmp_path / "idx")
    export_index(index, tmp_path / "out", "faiss")
    recall = json.loads((tmp_path / "out" / "recall.json").read_text())
    assert f"recall@10 {recall['recall']:.3f}" in capfd.readouterr().err
    built = faiss.read_index(str(tmp_path / "out" / "index.faiss"))
    gradients = index.gradients_of(range(400)).numpy()
    exact = np.argsort(-gradients @ gradients.T, axis=1)[:, :10]
    sample = np.random.default_rng(1).permutation(400)[:64]
    found = built.search(gradients[sample], 10)[1]
    hits = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, exact[sample], strict=True)])
    assert recall["recall"] == pytest.approx(hits, abs=0.01)
    built.nprobe = recall["lists"]
    assert np.mean(built.search(gradients, 10)[1][:, 0] == exact[:, 0]) > 0.99


def test_a_lance_dataset_holds_every_row(index, tmp_path):
    lance = pytest.importorskip("lance")
    [path] = export_index(index, tmp_path / "out", "lance")
    table = lance.dataset(str(path)).to_table()
    assert table["id"].to_pylist() == [f"e{row}" for row in range(60)]
    stored = np.array(table["gradient"].to_pylist(), dtype=np.float32)
    assert np.array_equal(stored, gradient_rows(np.arange(60)).numpy())


@pytest.mark.parametrize(("to", "module"), [("lance", "lance"), ("faiss", "faiss")])
def test_a_missing_extra_says_what_to_install(index, tmp_path, monkeypatch, to, module):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(MissingExtra, match=rf"pip install 'vestige\[{to}\]'"):
        export_index(index, tmp_path / "out", to)


@pytest.fixture
def run(tmp_path, record, content):  # noqa: F811
    return write_run(tmp_path / "run", record, content)


def test_a_run_is_exported_to_tables(run, tmp_path):
    [path] = export(path=run, out=tmp_path / "csv", to="csv")
    with path.open(newline="") as file:
        header, *rows = csv.reader(file)
    assert ",".join(header) == "query_id,end,rank,example_id,score,percentile,text,source,row"
    assert rows[0][:5] == ["q0", "proponent", "1", "a", "3.0"]
    assert len(rows) == 2 * 2 * 3
    [path] = export(path=run, out=tmp_path / "json", to="json")
    exported = json.loads(path.read_text())
    assert exported["meaning"]["sign"].startswith("positive")
    assert exported["scores"][0]["example_id"] == "a"
    export(path=run, out=tmp_path / "hf", to="datasets")
    assert load_from_disk(str(tmp_path / "hf"))[0]["example_id"] == "a"


def test_a_format_for_the_other_kind_is_refused(run, index, tmp_path):
    with pytest.raises(SpecError, match=r"is a run, and `to` numpy is for an index. Expected one of: csv, datasets"):
        export(path=run, out=tmp_path / "out")
    with pytest.raises(SpecError, match=r"is an index, and `to` csv is for a run. Expected one of: arrow"):
        export(path=index.folder, out=tmp_path / "out", to="csv")
    assert not (tmp_path / "out").exists()


def test_help_lists_every_announced_format(capsys, monkeypatch):
    from vestige.cli import main

    monkeypatch.setenv("COLUMNS", "200")
    main(["export", "--help-all"])
    lines = capsys.readouterr().out.splitlines()
    for kind, name in (each.split() for each in EXPORT_FORMATS.names()):
        assert any(line.strip().startswith(f"- {kind}: ") and name in line for line in lines), (kind, name)


def test_another_package_adds_a_format(index, tmp_path, monkeypatch):
    def write_count(index, out):
        (out / "count").write_text(str(index.rows))
        return [out / "count"]

    monkeypatch.setattr(Registry, "names", lambda self: ["index count"])
    monkeypatch.setattr(Registry, "find", lambda self, name: {"index count": write_count}[name])
    assert export_index(index, tmp_path / "out", "count") == [tmp_path / "out" / "count"]
    assert (tmp_path / "out" / "count").read_text() == "60"
