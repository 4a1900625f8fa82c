"""The examples behind the rows, kept with the index so that it can be read without the data it was made from."""

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet

from vestige.data import Example, Message, TokenizedData
from vestige.errors import CorruptFile
from vestige.files import make_folder, write_durably
from vestige.index._manifest import Manifest, PlanStage

_GROUP = 10_000
"""Examples turned into a table at once, so that memory does not grow with the data."""

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("row", pa.int64()),
        ("text", pa.string()),
        ("prompt", pa.string()),
        ("completion", pa.string()),
        ("messages", pa.string()),
        ("source", pa.string()),
        ("label", pa.string()),
        ("extra", pa.string()),
        ("length", pa.int64()),
    ]
)


def fingerprint_rows(data: TokenizedData, start: int, stop: int) -> str:
    """sha256 over the examples `start:stop`: ids, tokens, targets, texts, sources and labels, in order."""
    digest = hashlib.sha256()
    for row in range(start, stop):
        digest.update(json.dumps(_record(data.examples[row], 0), sort_keys=True).encode())
        for values in (np.asarray(data.input_ids[row], "<i4"), np.packbits(data.targets[row])):
            digest.update(len(values).to_bytes(8, "little"))
            digest.update(values.tobytes())
    return digest.hexdigest()


def write_examples(
    folder: Path, manifest: Manifest, examples: Sequence[Example], lengths: Sequence[int] | np.ndarray
) -> None:
    """Each stage of the plan has its examples in a Parquet file of its own; those that are there stay as they are."""
    make_folder(folder / "examples")
    for number, stage in enumerate(manifest.plan.stages):
        path = _path(folder, number)
        if not _is_whole(path, stage):
            rows = range(stage.start, stage.stop)
            groups = (rows[first : first + _GROUP] for first in range(0, len(rows), _GROUP))
            tables = (_table([_record(examples[row], int(lengths[row])) for row in group]) for group in groups)
            write_durably(path, streamed(tables, lambda sink: parquet.ParquetWriter(sink, SCHEMA)))


def read_examples(folder: Path, manifest: Manifest) -> tuple[list[Example], np.ndarray]:
    """All examples of an index in row order, and their lengths in tokens, int64 [example].

    Raises:
        CorruptFile: A file is missing or does not hold what the manifest says.
    """
    tables = []
    for number, stage in enumerate(manifest.plan.stages):
        path = _path(folder, number)
        if not _is_whole(path, stage):
            raise CorruptFile(f"{path} is missing or damaged. Run the same vestige index command again.")
        tables.append(parquet.read_table(path))
    table = pa.concat_tables(tables)
    return [_example(record) for record in table.to_pylist()], table["length"].to_numpy()


class _TableWriter(Protocol):
    def write_table(self, table: pa.Table) -> None: ...
    def close(self) -> None: ...


def streamed(tables: Iterator[pa.Table], open_writer: Callable[[Any], _TableWriter]) -> Iterator[bytes]:
    """The bytes that an Arrow or Parquet writer makes of `tables`, handed over table by table."""
    pipe = _Pipe()
    writer = open_writer(pa.PythonFile(pipe, mode="w"))
    for table in tables:
        writer.write_table(table)
        yield pipe.drained()
    writer.close()
    yield pipe.drained()


class _Pipe(io.RawIOBase):
    """A file that remembers what was written since it was last drained."""

    def __init__(self) -> None:
        self._held: list[bytes] = []
        self._position = 0

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        self._held.append(bytes(content))
        self._position += len(self._held[-1])
        return len(self._held[-1])

    def tell(self) -> int:
        return self._position

    def drained(self) -> bytes:
        held, self._held = self._held, []
        return b"".join(held)


def _path(folder: Path, stage: int) -> Path:
    return folder / "examples" / f"{stage:05d}.parquet"


def _is_whole(path: Path, stage: PlanStage) -> bool:
    try:
        return parquet.read_metadata(path).num_rows == stage.stop - stage.start
    except (OSError, pa.ArrowException):
        return False


def _record(example: Example, length: int) -> dict[str, Any]:
    turns = [[message.role, message.content] for message in example.messages]
    return {
        "id": example.id,
        "row": example.row,
        "text": example.text,
        "prompt": example.prompt,
        "completion": example.completion,
        "messages": json.dumps(turns, ensure_ascii=False) if turns else None,
        "source": example.source,
        "label": example.label,
        "extra": json.dumps(example.extra, ensure_ascii=False, default=str) if example.extra else None,
        "length": length,
    }


def _table(records: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(records, schema=SCHEMA)


def _example(record: dict[str, Any]) -> Example:
    fields = {name: record[name] for name in ("id", "row", "text", "prompt", "completion", "source", "label")}
    messages = tuple(Message(role, content) for role, content in json.loads(record["messages"] or "[]"))
    return Example(**fields, messages=messages, extra=json.loads(record["extra"] or "{}"))
