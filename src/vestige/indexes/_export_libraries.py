"""An index for other libraries: a safetensors file, a `datasets` folder, a Lance dataset."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import torch

from vestige.data import turn_record
from vestige.errors import MissingExtra
from vestige.indexes._content import safetensors_header
from vestige.indexes._export_rows import exported_bytes, losses_and_norms, parts_in_order
from vestige.indexes._store import Index
from vestige.storage import check_disk, write_durably


def write_safetensors(index: Index, out: Path) -> list[Path]:
    """Write `index.safetensors` with gradients [row, column], loss and norm in the order of the data, float32."""
    loss, norm = losses_and_norms(index)
    shapes = {
        "loss": (torch.float32, [index.rows]),
        "norm": (torch.float32, [index.rows]),
        "gradients": (torch.float32, [index.rows, index.width]),
    }
    ids = json.dumps([example.id for example in index.examples()])
    metadata = {
        "axes": "gradients: row column",
        "example_ids": ids,
        "vestige.manifest": json.dumps(index.manifest.model_dump(mode="json")),
    }

    def pieces() -> Iterator[bytes | memoryview]:
        yield safetensors_header(shapes, metadata)
        yield loss.numpy().data
        yield norm.numpy().data
        for part in parts_in_order(index):
            yield part.gradients.contiguous().numpy().data

    write_durably(out / "index.safetensors", pieces())
    return [out / "index.safetensors"]


def write_dataset(index: Index, out: Path) -> list[Path]:
    """Write a folder for `datasets.load_from_disk`: the columns of the examples, loss, norm and gradient."""
    from datasets import Dataset

    check_disk(out.parent, 2 * exported_bytes(index))
    schema = example_schema(index)
    # `datasets` saves only what is not in the folder that it saves to.
    with TemporaryDirectory(prefix=".rows-", dir=out) as folder:
        held = str(Path(folder) / "rows.arrow")
        with pa.OSFile(held, "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for batch in example_batches(index, schema):
                writer.write_batch(batch)
        Dataset.from_file(held).save_to_disk(str(out))
    return [out]


def write_lance(index: Index, out: Path) -> list[Path]:
    """Write `index.lance`: the same columns, the gradient as a vector column that Lance can index.

    Raises:
        MissingExtra: pylance is not installed.
    """
    try:
        import lance  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingExtra("Lance datasets need pylance.\nType: pip install 'vestige[lance]'") from error
    schema, path = example_schema(index), out / "index.lance"
    try:
        lance.write_dataset(example_batches(index, schema), str(path), schema=schema)
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise
    return [path]


def example_schema(index: Index) -> pa.Schema:
    """Return the columns of an example with its gradient; the manifest is in the metadata."""
    text = [(name, pa.string()) for name in ("id", "text", "prompt", "completion", "messages", "source", "label")]
    numbers = [
        ("loss", pa.float32()),
        ("norm", pa.float32()),
        ("gradient", pa.list_(pa.float32(), index.width)),
    ]
    manifest = json.dumps(index.manifest.model_dump(mode="json"))
    return pa.schema([*text, *numbers], metadata={"vestige.manifest": manifest})


def example_batches(index: Index, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Yield the rows of `example_schema` in the order of the data."""
    examples, (loss, norm) = index.examples(), losses_and_norms(index)
    for part in parts_in_order(index):
        rows = examples[part.start : part.stop]
        turns = [
            json.dumps([turn_record(turn) for turn in row.messages], ensure_ascii=False, default=str)
            if row.messages
            else None
            for row in rows
        ]
        words = {
            name: turns if name == "messages" else [getattr(row, name) for row in rows] for name in schema.names[:7]
        }
        gradients = pa.FixedSizeListArray.from_arrays(pa.array(part.gradients.numpy().reshape(-1)), index.width)
        place = slice(part.start, part.stop)
        arrays = [pa.array(column, pa.string()) for column in words.values()]
        arrays += [pa.array(loss[place].numpy()), pa.array(norm[place].numpy()), gradients]
        yield pa.record_batch(arrays, schema=schema)
