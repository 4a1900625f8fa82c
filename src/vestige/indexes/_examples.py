"""The examples behind the rows, kept with the index so that it can be read without the data it was made from."""

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet

from vestige.data import EXAMPLES, GROUP_ROWS, Example, TokenizedData, record_of
from vestige.errors import CorruptFile
from vestige.indexes._manifest import Manifest
from vestige.storage import make_folder, write_durably
from vestige.tables import read_table

_FILE_ROWS = 64 * GROUP_ROWS
"""Examples in a file: its table of contents, about 1 kB a row group, is in memory while it is written or open."""


def fingerprint_rows(data: TokenizedData, start: int, stop: int) -> str:
    """Return the sha256 of the examples `start:stop`: ids, tokens, targets, texts, sources and labels, in order."""
    digest = hashlib.sha256()
    for row in range(start, stop):
        digest.update(json.dumps(record_of(data.examples[row], 0), sort_keys=True).encode())
        for values in (np.asarray(data.input_ids[row], "<i4"), np.packbits(data.targets[row])):
            digest.update(len(values).to_bytes(8, "little"))
            digest.update(values.tobytes())
    return digest.hexdigest()


def write_examples(folder: Path, manifest: Manifest, examples: Sequence[Example], lengths: np.ndarray) -> None:
    """Write the examples of each stage of the plan to Parquet files of its own; existing ones stay as they are."""
    make_folder(folder / "examples")
    for number, stage in enumerate(manifest.plan.stages):
        if _holds(_paths(folder, number), stage.stop - stage.start):
            continue
        for place, first in enumerate(range(stage.start, stage.stop, _FILE_ROWS)):
            path = folder / "examples" / f"{number:05d}-{place:05d}.parquet"
            rows = range(first, min(first + _FILE_ROWS, stage.stop))
            if not _holds([path], len(rows)):
                write_durably(path, _stream(_tables(rows, examples, lengths)))


def read_lengths(folder: Path, manifest: Manifest) -> np.ndarray:
    """Return the lengths of all examples of an index in tokens, int64 [example]."""
    tables = [
        read_table(path, EXAMPLES, "Run the same vestige index command again.", required=["length"], columns=["length"])
        for path in examples_paths(folder, manifest)
    ]
    return pa.concat_tables(tables)["length"].to_numpy()


def examples_paths(folder: Path, manifest: Manifest) -> list[Path]:
    """Return the files of the examples of an index, in row order."""
    found = []
    for number, stage in enumerate(manifest.plan.stages):
        paths = _paths(folder, number)
        if not _holds(paths, stage.stop - stage.start):
            raise CorruptFile(
                f"A file {folder / 'examples'}/{number:05d}*.parquet is missing or damaged. Run the same vestige index "
                "command again."
            )
        found += paths
    return found


def _stream(tables: Iterator[pa.Table]) -> Iterator[bytes]:
    """Yield the bytes of a Parquet file of `tables`, table by table."""
    held = io.BytesIO()
    with parquet.ParquetWriter(pa.PythonFile(held, mode="w"), EXAMPLES) as writer:
        for table in tables:
            writer.write_table(table)
            yield held.getvalue()
            held.seek(0)
            held.truncate()
    yield held.getvalue()


def _paths(folder: Path, stage: int) -> list[Path]:
    """Return the files of a stage, in order. Of an older index it is one, named by the stage alone."""
    parts = sorted((folder / "examples").glob(f"{stage:05d}-*.parquet"))
    return parts or [folder / "examples" / f"{stage:05d}.parquet"]


def _holds(paths: Sequence[Path], rows: int) -> bool:
    try:
        return sum(parquet.read_metadata(path).num_rows for path in paths) == rows
    except (OSError, pa.ArrowException):
        return False


def _tables(rows: range, examples: Sequence[Example], lengths: np.ndarray) -> Iterator[pa.Table]:
    """Yield the examples at `rows`, one row group after another."""
    for first in range(0, len(rows), GROUP_ROWS):
        records = [record_of(examples[row], int(lengths[row])) for row in rows[first : first + GROUP_ROWS]]
        yield pa.Table.from_pylist(records, schema=EXAMPLES)
