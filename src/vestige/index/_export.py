"""An index in formats that other programs read: NumPy arrays, an Arrow file, a Parquet file."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet

from vestige.errors import SpecError, UserError
from vestige.files import check_disk, make_folder, write_durably
from vestige.index._examples import streamed
from vestige.index._store import Index, IndexBlock

ExportFormat = Literal["numpy", "arrow", "parquet"]


def export_index(index: Index, out: str | Path, to: ExportFormat = "numpy") -> list[Path]:
    """The whole index as float32 in the folder `out`, in the order in which its rows are stored.

    - `numpy`: `gradients.npy` [row, column], `loss.npy`, `norm.npy`, `example.npy` and `index.json` (the manifest);
    - `arrow` and `parquet`: one file with the columns example, id, loss, norm and gradient; the manifest is in the
      metadata of its schema.

    Args:
        index: A finished index.
        out: A folder, new or empty.
        to: The format.

    Returns:
        The files written.

    Raises:
        SpecError: The format is not one of these.
        UserError: `out` is not empty.
        DiskSpaceError: It would not fit.
    """
    out = Path(out)
    if to not in get_args(ExportFormat):
        raise SpecError(f"--to {to} is not known. Expected one of: {', '.join(get_args(ExportFormat))}.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not an empty folder. Choose another --out.")
    check_disk(out, index.rows * (4 * index.width + 16))
    make_folder(out)
    if to == "numpy":
        return _write_numpy(index, out)
    path = out / f"index.{to}"
    schema = _schema(index)
    if to == "arrow":
        write_durably(path, streamed(_tables(index, schema), lambda sink: pa.ipc.new_file(sink, schema)))
    else:
        write_durably(path, streamed(_tables(index, schema), lambda sink: parquet.ParquetWriter(sink, schema)))
    return [path]


def _write_numpy(index: Index, out: Path) -> list[Path]:
    small: list[IndexBlock] = []
    paths = [out / f"{name}.npy" for name in ("gradients", "example", "loss", "norm")]

    def pieces() -> Iterator[bytes | memoryview]:
        yield _npy_header((index.rows, index.width))
        for block in index.blocks():
            small.append(block._replace(gradients=block.gradients[:0]))
            yield block.gradients.numpy().data

    write_durably(paths[0], pieces())
    for path in paths[1:]:
        values = np.concatenate([getattr(block, path.stem).numpy() for block in small])
        content = io.BytesIO()
        np.save(content, values)
        write_durably(path, [content.getvalue()])
    write_durably(out / "index.json", [index.manifest.to_json()])
    return [*paths, out / "index.json"]


def _npy_header(shape: tuple[int, int]) -> bytes:
    content = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(content, header)
    return content.getvalue()


def _schema(index: Index) -> pa.Schema:
    fields = [
        ("example", pa.int64()),
        ("id", pa.string()),
        ("loss", pa.float32()),
        ("norm", pa.float32()),
        ("gradient", pa.list_(pa.float32(), index.width)),
    ]
    manifest = json.dumps(index.manifest.model_dump(mode="json"))
    return pa.schema(fields, metadata={"vestige.manifest": manifest})


def _tables(index: Index, schema: pa.Schema) -> Iterator[pa.Table]:
    ids = [example.id for example in index.examples()]
    for block in index.blocks():
        gradients = pa.FixedSizeListArray.from_arrays(pa.array(block.gradients.numpy().reshape(-1)), index.width)
        rows = block.example.numpy()
        columns = [rows, [ids[row] for row in rows], block.loss.numpy(), block.norm.numpy(), gradients]
        yield pa.table(columns, schema=schema)
