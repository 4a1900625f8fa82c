"""Parquet tables that are there whole, or as they were before."""

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet

from vestige.errors import CorruptFile
from vestige.storage import write_durably


def write_table(path: Path, table: pa.Table) -> None:
    """Write the table to disk."""
    buffer = io.BytesIO()
    parquet.write_table(table, buffer, compression="zstd")
    write_durably(path, [buffer.getbuffer()])


def read_table(path: Path) -> pa.Table:
    """Read the table of a file.

    Raises:
        CorruptFile: It is damaged.
    """
    try:
        return parquet.read_table(path, memory_map=False)
    except (OSError, pa.ArrowException) as error:
        raise CorruptFile(f"{path} cannot be read: {error}. Restore it, or delete it to go on without.") from error
