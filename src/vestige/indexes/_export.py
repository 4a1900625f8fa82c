"""`vestige export`: an index, or a run, in formats that other programs read."""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet

from vestige.errors import SpecError, UserError
from vestige.indexes._examples import streamed
from vestige.indexes._export_rows import exported_bytes
from vestige.indexes._store import Index, IndexBlock
from vestige.registry import EXPORT_FORMATS, ExportFormat
from vestige.runs import Audit, Scores, is_audit, is_run
from vestige.settings import ExportSettings, verb
from vestige.storage import check_disk, stage_folder, write_durably

_KINDS = {"index": "an index", "run": "a run", "audit": "an audit"}
"""What can be exported: the first word of a format's name, and what messages call it."""


@verb(ExportSettings)
def export(settings: ExportSettings) -> list[Path]:
    """Write the index, or the run, at `path` to the folder `out`; return the files that were written.

    Raises:
        SpecError: The format is not known for what lies there.
        MissingExtra: The format needs a package that is not installed.
        UserError: `path` is neither, or `out` is not empty.
    """
    if not is_run(settings.path):
        return export_index(Index.open(settings.path), settings.out, settings.to)
    kind = "audit" if is_audit(settings.path) else "run"
    write = _format(kind, settings.to, settings.path)
    _require_empty(settings.out)
    opened = Audit.open(settings.path) if kind == "audit" else Scores.open(settings.path)
    return _staged(settings.out, lambda out: write(opened, out))


def export_index(index: Index, out: str | Path, to: str = "numpy") -> list[Path]:
    """Write the whole index to the folder `out`.

    Args:
        index: A finished index.
        out: A folder, new or empty.
        to: The format: one of those that docs/formats.md lists.

    Returns:
        The files written.

    Raises:
        SpecError: The format is not one of these.
        MissingExtra: The format needs a package that is not installed.
        UserError: `out` is not empty.
        DiskSpaceError: It would not fit.
    """
    out = Path(out)
    write = _format("index", to, index.folder)
    _require_empty(out)
    check_disk(out, exported_bytes(index))
    return _staged(out, lambda folder: write(index, folder))


def _format(kind: str, to: str, path: Path) -> ExportFormat:
    """Return what writes the format `to` of what is at `path`, which is of this kind."""
    names = EXPORT_FORMATS.names()
    if f"{kind} {to}" in names:
        return EXPORT_FORMATS.find(f"{kind} {to}")
    known = ", ".join(name.split()[1] for name in names if name.split()[0] == kind)
    other = next((what for one, what in _KINDS.items() if f"{one} {to}" in names), None)
    if other is not None:
        raise SpecError(f"{path} is {_KINDS[kind]}, and --to {to} is for {other}. Expected one of: {known}.")
    raise SpecError(
        f"--to {to} is not known for {_KINDS[kind]}. Expected one of: {known}. Layouts of other software need: "
        "pip install 'vestige[recipes]'."
    )


def _staged(out: Path, write: Callable[[Path], list[Path]]) -> list[Path]:
    """Return the files that `write` left in a folder, at their paths in `out`, which has all of them at once."""
    with stage_folder(out) as folder:
        written = [path.relative_to(folder) for path in write(folder)]
    return [out / path for path in written]


def _require_empty(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not an empty folder. Choose another --out.")


def write_numpy(index: Index, out: Path) -> list[Path]:
    """Write `gradients.npy` [row, column], `loss.npy`, `norm.npy`, `example.npy`, and the manifest as `index.json`.

    Rows are in the order in which they are stored, as in the two tables.
    """
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


def write_arrow(index: Index, out: Path) -> list[Path]:
    """Write `index.arrow`: the columns example, id, loss, norm and gradient; the manifest is in its schema."""
    schema = _schema(index)
    content = streamed(_tables(index, schema), lambda sink: pa.ipc.new_file(sink, schema))
    write_durably(out / "index.arrow", content)
    return [out / "index.arrow"]


def write_parquet(index: Index, out: Path) -> list[Path]:
    """Write `index.parquet`, with the columns of `index.arrow`."""
    schema = _schema(index)
    content = streamed(_tables(index, schema), lambda sink: parquet.ParquetWriter(sink, schema))
    write_durably(out / "index.parquet", content)
    return [out / "index.parquet"]


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
