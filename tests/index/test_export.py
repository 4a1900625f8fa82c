import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from tests.index.synthetic import WIDTH, build, gradient_rows
from vestige.errors import SpecError, UserError
from vestige.index import Index, export_index


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
    with pytest.raises(SpecError, match=r"--to csv is not known. Expected one of: numpy, arrow, parquet"):
        export_index(index, tmp_path / "out", "csv")
    (tmp_path / "notes").touch()
    with pytest.raises(UserError, match="not an empty folder"):
        export_index(index, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]
