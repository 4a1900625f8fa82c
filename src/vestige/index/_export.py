"""`vestige export`: an index, or a run, in formats that other programs read."""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet

from vestige.errors import SpecError, UserError
from vestige.files import check_disk, write_durably
from vestige.folders import staged_folder
from vestige.index._examples import streamed
from vestige.index._export_audit import write_audit_as
from vestige.index._export_faiss import write_faiss
from vestige.index._export_libraries import write_dataset, write_lance, write_safetensors
from vestige.index._export_published import write_chunks, write_projections
from vestige.index._export_run import write_run_as
from vestige.index._store import Index, IndexBlock
from vestige.runs import Audit, Scores, is_audit, is_run
from vestige.settings import ExportFormat, ExportSettings, IndexFormat, RunFormat, verb

_INDEX_FORMATS, _RUN_FORMATS = get_args(IndexFormat), get_args(RunFormat)
_LAYOUTS: dict[str, Callable[[Index, Path], list[Path]]] = {
    "safetensors": write_safetensors,
    "datasets": write_dataset,
    "lance": write_lance,
    "faiss": write_faiss,
    "projections": write_projections,
    "chunks": write_chunks,
}
"""Formats that are written in the order of the data."""


@verb(ExportSettings)
def export(settings: ExportSettings) -> list[Path]:
    """Write the index, or the run, at `path` to the folder `out`; return the files that were written.

    Raises:
        SpecError: The format is for the other of the two.
        MissingExtra: The format needs a package that is not installed.
        UserError: `path` is neither, or `out` is not empty.
    """
    if not is_run(settings.path):
        return export_index(Index.open(settings.path), settings.out, settings.to)
    if settings.to not in _RUN_FORMATS:
        raise SpecError(
            f"{settings.path} is a run, and --to {settings.to} is for an index. Expected one of: "
            f"{', '.join(_RUN_FORMATS)}."
        )
    _require_empty(settings.out)
    to = cast(RunFormat, settings.to)
    if is_audit(settings.path):
        audit = Audit.open(settings.path)
        return _staged(settings.out, lambda out: write_audit_as(audit, out, to))
    scores = Scores.open(settings.path)
    return _staged(settings.out, lambda out: write_run_as(scores, out, to))


def export_index(index: Index, out: str | Path, to: ExportFormat = "numpy") -> list[Path]:
    """Write the whole index to the folder `out`.

    - `numpy`: `gradients.npy` [row, column], `loss.npy`, `norm.npy`, `example.npy` and `index.json` (the manifest);
    - `arrow` and `parquet`: one file with the columns example, id, loss, norm and gradient; the manifest is in the
      metadata of its schema. These three keep the order in which the rows are stored;
    - `safetensors`, `datasets`, `lance`, `faiss`, `projections`, `chunks`: see docs/formats.md; in the order of the
      data.

    Args:
        index: A finished index.
        out: A folder, new or empty.
        to: The format.

    Returns:
        The files written.

    Raises:
        SpecError: The format is not one of these.
        MissingExtra: The format needs a package that is not installed.
        UserError: `out` is not empty.
        DiskSpaceError: It would not fit.
    """
    out = Path(out)
    if to not in _INDEX_FORMATS:
        raise SpecError(f"--to {to} is not known for an index. Expected one of: {', '.join(_INDEX_FORMATS)}.")
    _require_empty(out)
    # A `datasets` folder is written twice, a FAISS index is kept with its positions.
    check_disk(out, index.rows * (4 * index.width + 16) * (2 if to == "datasets" else 1))
    return _staged(out, lambda folder: _write(index, folder, to))


def _staged(out: Path, write: Callable[[Path], list[Path]]) -> list[Path]:
    """Return the files that `write` left in a folder, at their paths in `out`, which has all of them at once."""
    with staged_folder(out) as folder:
        written = [path.relative_to(folder) for path in write(folder)]
    return [out / path for path in written]


def _write(index: Index, out: Path, to: ExportFormat) -> list[Path]:
    if to == "numpy":
        return _write_numpy(index, out)
    if to in _LAYOUTS:
        return _LAYOUTS[to](index, out)
    path = out / f"index.{to}"
    schema = _schema(index)
    if to == "arrow":
        write_durably(path, streamed(_tables(index, schema), lambda sink: pa.ipc.new_file(sink, schema)))
    else:
        write_durably(path, streamed(_tables(index, schema), lambda sink: parquet.ParquetWriter(sink, schema)))
    return [path]


def _require_empty(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not an empty folder. Choose another --out.")


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
