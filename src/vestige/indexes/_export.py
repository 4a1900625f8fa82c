"""`vestige export`: an index, or a run, in formats that other programs read.

A writer of indexes gets a folder that becomes the result whole, and returns the paths that it wrote there.
"""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
from jaxtyping import Float
from pyarrow import csv as arrow_csv

from vestige.data import turn_record
from vestige.errors import MissingExtra, SpecError, UserError
from vestige.indexes._manifest import PRECONDITIONED
from vestige.indexes._push import push
from vestige.indexes._shards import safetensors_header
from vestige.indexes._store import Index, parts_in_order
from vestige.lazy import torch
from vestige.progress import announce
from vestige.registry import EXPORT_FORMATS, ExportFormat
from vestige.runs import Audit, Scores, is_audit, is_run
from vestige.settings import ExportSettings, with_settings
from vestige.storage import check_disk, stage_folder, write_durably

_COLUMNS: tuple[str, ...] = ("query_id", "end", "rank", "example_id", "score", "percentile", "text", "source", "row")


def write_run_csv(scores: Scores, out: Path) -> list[Path]:
    """Write `scores.csv`: one row per listed score, with the text of the example."""
    content = io.StringIO()
    writer = csv.DictWriter(content, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(scores.to_rows())
    write_durably(out / "scores.csv", [content.getvalue().encode()])
    return [out / "scores.csv"]


def write_run_json(scores: Scores, out: Path) -> list[Path]:
    """Write `scores.json`: what the scores mean, and the rows of `scores.csv`."""
    run = scores.run
    content = {
        "method": run.method,
        "meaning": run.meaning.to_dict(),
        "command": run.command,
        "scores": scores.to_rows(),
    }
    write_durably(out / "scores.json", [json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n"])
    return [out / "scores.json"]


def write_run_dataset(scores: Scores, out: Path) -> list[Path]:
    """Write the rows of `scores.csv` as a folder for `datasets.load_from_disk`."""
    from datasets import Dataset

    Dataset.from_list(scores.to_rows()).save_to_disk(str(out))
    return [out]


_TEXT_COLUMNS = ["row", "part", "source", "label", "class", "flag", "targets", "text"]


def write_audit_csv(audit: Audit, out: Path) -> list[Path]:
    """Write `evidence.csv`: a row per example, checkpoint and layer, with the example's text."""
    sink = pa.BufferOutputStream()
    arrow_csv.write_csv(_whole(audit), sink)
    write_durably(out / "evidence.csv", [sink.getvalue().to_pybytes()])
    return [out / "evidence.csv"]


def write_audit_json(audit: Audit, out: Path) -> list[Path]:
    """Write `evidence.json`: the record of the run, and the rows of `evidence.csv`; what is not computed is null."""
    content = {"run": audit.run.model_dump(mode="json"), "evidence": _whole(audit).to_pylist()}
    write_durably(out / "evidence.json", [json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n"])
    return [out / "evidence.json"]


def write_audit_dataset(audit: Audit, out: Path) -> list[Path]:
    """Write the rows of `evidence.csv` as a folder for `datasets.load_from_disk`."""
    from datasets import Dataset

    Dataset(_whole(audit)).save_to_disk(str(out))
    return [out]


def _whole(audit: Audit) -> pa.Table:
    """Return the evidence with the columns of the examples beside it, in the order of the evidence."""
    evidence, examples = audit.table(), audit.examples.select(_TEXT_COLUMNS)
    rows = examples["row"].to_numpy()
    order = np.argsort(rows)
    described = examples.take(order[np.searchsorted(rows, evidence["row"].to_numpy(), sorter=order)])
    for name in _TEXT_COLUMNS[1:]:
        evidence = evidence.append_column(name, described[name])
    return evidence


_KINDS = {
    "index": "an index",
    "run": "a run",
    "audit": "an audit",
    "components": "a component search",
    "preconditioned": "a folder of preconditioned gradients",
}
"""What can be exported: the first word of a format's name, and what messages call it."""
_COMPONENTS = "components.json"
"""What `vestige evaluate components` leaves; its formats are given the folder, not what is in it."""
_TEXTS = ("id", "text", "prompt", "completion", "messages", "source", "label")
_TRAINED_PER_LIST, _FEWEST_PER_LIST = 64, 39
"""Rows that FAISS fits its cells on, for each cell; with fewer than 39 it doubts the cells."""
_QUERIES, _K, _SEED = 64, 10, 0


@with_settings(ExportSettings)
def export(settings: ExportSettings) -> list[Path]:
    """Write what lies at `path` to the folder `out`, or push it to the hub; return the files written.

    An index, a run, an audit, a component search or preconditioned gradients.

    Raises:
        SpecError: The format is not known for what lies there.
        MissingExtra: The format needs a package that is not installed.
        UserError: `path` is neither, or `out` is not empty.
    """
    if settings.push_to_hub is not None:
        announce(push(settings))
    if settings.out is None:
        return []
    for kind, name in (("components", _COMPONENTS), ("preconditioned", PRECONDITIONED)):
        if (settings.path / name).is_file():
            write = _find_format(kind, settings.to, settings.path)
            return _write_staged(settings.out, lambda out, write=write: write(settings.path, out))
    if not is_run(settings.path):
        return export_index(Index.open(settings.path), settings.out, settings.to)
    kind = "audit" if is_audit(settings.path) else "run"
    write = _find_format(kind, settings.to, settings.path)
    opened = Audit.open(settings.path) if kind == "audit" else Scores.open(settings.path)
    return _write_staged(settings.out, lambda out: write(opened, out))


def export_index(index: Index, out: str | Path, to: str = "numpy") -> list[Path]:
    """Write a finished index to the folder `out`, new or empty, in a format that docs/formats.md lists.

    Returns:
        The files written.

    Raises:
        SpecError: The format is not one of these.
        MissingExtra: The format needs a package that is not installed.
        UserError: `out` is not empty.
        DiskSpaceError: It would not fit.
    """
    write = _find_format("index", to, index.folder)
    return _write_staged(Path(out), lambda folder: write(index, folder), _count_bytes(index))


def _find_format(kind: str, to: str, path: Path) -> ExportFormat:
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


def _write_staged(out: Path, write: Callable[[Path], list[Path]], needed: int = 0) -> list[Path]:
    """Return the files that `write` left in a folder, at their paths in `out`, which has all of them at once."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not an empty folder. Choose another --out.")
    if needed:
        check_disk(out, needed)
    with stage_folder(out) as folder:
        written = [path.relative_to(folder) for path in write(folder)]
    return [out / path for path in written]


def _count_bytes(index: Index) -> int:
    """Return the size on disk of all rows in float32, with their loss, norm and number."""
    return index.rows * (4 * index.width + 16)


def write_numpy(index: Index, out: Path) -> list[Path]:
    """Write `gradients.npy` [row, column], `loss.npy`, `norm.npy`, `example.npy`, and the manifest as `index.json`.

    Rows are in the order in which they are stored, as in the two tables.
    """
    small: dict[str, list[np.ndarray]] = {"example": [], "loss": [], "norm": []}

    def pieces() -> Iterator[bytes | memoryview]:
        header = io.BytesIO()
        shape = {"descr": "<f4", "fortran_order": False, "shape": (index.rows, index.width)}
        np.lib.format.write_array_header_1_0(header, shape)
        yield header.getvalue()
        for block in index.blocks():
            for name, values in small.items():
                values.append(getattr(block, name).numpy())
            yield block.gradients.numpy().data

    write_durably(out / "gradients.npy", pieces())
    for name, values in small.items():
        np.save(out / f"{name}.npy", np.concatenate(values))
    (out / "index.json").write_bytes(index.manifest.to_json())
    return [out / name for name in ("gradients.npy", *(f"{name}.npy" for name in small), "index.json")]


def write_arrow(index: Index, out: Path) -> list[Path]:
    """Write `index.arrow`: the columns example, id, loss, norm and gradient; the manifest is in its schema."""
    return _write_table(index, out / "index.arrow", pa.ipc.new_file)


def write_parquet(index: Index, out: Path) -> list[Path]:
    """Write `index.parquet`, with the columns of `index.arrow`."""
    return _write_table(index, out / "index.parquet", parquet.ParquetWriter)


def _write_table(index: Index, path: Path, open_writer: Callable[..., Any]) -> list[Path]:
    schema = _schema(index, ("example", pa.int64()), ("id", pa.string()))
    ids = [example.id for example in index.examples()]
    with open_writer(str(path), schema) as writer:
        for block in index.blocks():
            rows = block.example.numpy()
            columns = [rows, [ids[row] for row in rows], block.loss.numpy(), block.norm.numpy()]
            writer.write_table(pa.table([*columns, _vectors(block.gradients)], schema=schema))
    return [path]


def _schema(index: Index, *columns: tuple[str, pa.DataType]) -> pa.Schema:
    """Return the columns, then loss, norm and gradient; the manifest is in the metadata."""
    numbers = [("loss", pa.float32()), ("norm", pa.float32()), ("gradient", pa.list_(pa.float32(), index.width))]
    manifest = json.dumps(index.manifest.model_dump(mode="json"))
    return pa.schema([*columns, *numbers], metadata={"vestige.manifest": manifest})


def _vectors(gradients: Float[torch.Tensor, "row column"]) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(gradients.numpy().reshape(-1)), gradients.shape[1])


def write_safetensors(index: Index, out: Path) -> list[Path]:
    """Write `index.safetensors` with gradients [row, column], loss and norm in the order of the data, float32."""
    loss, norm = index.losses_and_norms()
    shapes = {
        "loss": (torch.float32, [index.rows]),
        "norm": (torch.float32, [index.rows]),
        "gradients": (torch.float32, [index.rows, index.width]),
    }
    metadata = {
        "axes": "gradients: row column",
        "example_ids": json.dumps([example.id for example in index.examples()]),
        "vestige.manifest": json.dumps(index.manifest.model_dump(mode="json")),
    }

    def pieces() -> Iterator[bytes | memoryview]:
        yield safetensors_header(shapes, metadata)
        yield loss.numpy().data
        yield norm.numpy().data
        for _, gradients in parts_in_order(index):
            yield gradients.contiguous().numpy().data

    write_durably(out / "index.safetensors", pieces())
    return [out / "index.safetensors"]


def write_dataset(index: Index, out: Path) -> list[Path]:
    """Write a folder for `datasets.load_from_disk`: the columns of the examples, loss, norm and gradient."""
    from datasets import Dataset

    check_disk(out.parent, 2 * _count_bytes(index))
    schema = _example_schema(index)
    # `datasets` saves only what is not in the folder that it saves to.
    with TemporaryDirectory(prefix=".rows-", dir=out) as folder:
        held = str(Path(folder) / "rows.arrow")
        with pa.OSFile(held, "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for batch in _example_batches(index, schema):
                writer.write_batch(batch)
        Dataset.from_file(held).save_to_disk(str(out))
    return [out]


def write_lance(index: Index, out: Path) -> list[Path]:
    """Write `index.lance`: the same columns, the gradient as a vector column that Lance can index."""
    try:
        import lance  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingExtra("Lance datasets need pylance.\nType: pip install 'vestige[lance]'") from error
    schema, path = _example_schema(index), out / "index.lance"
    try:
        lance.write_dataset(_example_batches(index, schema), str(path), schema=schema)
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise
    return [path]


def _example_schema(index: Index) -> pa.Schema:
    return _schema(index, *((name, pa.string()) for name in _TEXTS))


def _example_batches(index: Index, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Yield the rows of `_example_schema` in the order of the data."""
    examples, (loss, norm) = index.examples(), index.losses_and_norms()

    def write_turns(turns: Any) -> str | None:
        return json.dumps(list(map(turn_record, turns)), ensure_ascii=False, default=str) if turns else None

    for part, gradients in parts_in_order(index):
        columns = {name: [getattr(row, name) for row in examples[part]] for name in _TEXTS}
        columns["messages"] = list(map(write_turns, columns["messages"]))
        arrays = [pa.array(column, pa.string()) for column in columns.values()]
        arrays += [pa.array(loss[part].numpy()), pa.array(norm[part].numpy()), _vectors(gradients)]
        yield pa.record_batch(arrays, schema=schema)


def write_faiss(index: Index, out: Path) -> list[Path]:
    """Write `index.faiss` (inverted lists, inner product), `recall.json`, `ids.json`; position = row of the data.

    The cells are those of k-means on a sample; `nprobe`, the number of cells that are searched, is a tenth of them
    and kept in the file. The recall@10 of that setting, the share of the exact 10 best that are found with sampled
    rows as queries, is printed and written beside the file; a row's own position among its best counts.

    Raises:
        MissingExtra: faiss is not installed.
    """
    try:
        import faiss  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingExtra("Approximate search needs faiss.\nType: pip install 'vestige[faiss]'") from error
    lists = max(1, min(round(math.sqrt(index.rows)), index.rows // _FEWEST_PER_LIST))
    built = faiss.IndexIVFFlat(faiss.IndexFlatIP(index.width), index.width, lists, faiss.METRIC_INNER_PRODUCT)
    rows = np.random.default_rng(_SEED).permutation(index.rows)[: lists * _TRAINED_PER_LIST]
    built.train(np.ascontiguousarray(index.gradients_of(np.sort(rows)).numpy()))
    for _, gradients in parts_in_order(index):
        built.add(np.ascontiguousarray(gradients.numpy()))
    built.nprobe = max(1, lists // 10)
    count, k = min(_QUERIES, index.rows), min(_K, index.rows)
    queries = index.gradients_of(np.random.default_rng(_SEED + 1).permutation(index.rows)[:count])
    found, exact = built.search(np.ascontiguousarray(queries.numpy()), k)[1], _nearest(index, queries, k)
    hits = [len(set(mine) & set(truth)) for mine, truth in zip(found.tolist(), exact, strict=True)]
    recall = {"k": k, "nprobe": int(built.nprobe), "queries": count, "recall": float(np.mean(hits)) / k, "lists": lists}
    (out / "index.faiss").write_bytes(np.asarray(faiss.serialize_index(built)).data)
    (out / "recall.json").write_text(json.dumps(recall, indent=1) + "\n")
    ids = json.dumps([example.id for example in index.examples()], ensure_ascii=False)
    (out / "ids.json").write_text(ids + "\n", encoding="utf-8")
    announce(
        f"recall@{k} {recall['recall']:.3f} against exact search, over {count} rows as queries, with "
        f"{built.nprobe} of {lists} lists searched. A larger nprobe finds more and takes longer."
    )
    return [out / name for name in ("index.faiss", "recall.json", "ids.json")]


def _nearest(index: Index, queries: Float[torch.Tensor, "query column"], k: int) -> list[list[int]]:
    """Return the rows with the highest inner products with each query, updated part by part."""
    best, rows = torch.empty((len(queries), 0)), torch.empty((len(queries), 0), dtype=torch.int64)
    for numbers, scores, _ in index.scan(queries):
        best, rows = torch.cat([best, scores], 1), torch.cat([rows, numbers.expand(len(queries), -1)], 1)
        best, places = best.topk(min(k, best.shape[1]), dim=1)
        rows = rows.gather(1, places)
    return rows.tolist()
