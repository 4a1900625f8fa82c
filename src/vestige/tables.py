"""Parquet and safetensors files that may be damaged: written whole, read as expected, or refused by name."""

import io
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as compute
import pyarrow.parquet as parquet

from vestige.errors import CorruptFile
from vestige.storage import Written, write_durably


@contextmanager
def reading(path: Path, remedy: str) -> Iterator[None]:
    """Turn a library's error on a broken file inside the block into an error that names the file.

    Args:
        path: The file that the block reads, and nothing else happens in the block.
        remedy: A sentence on how to get the file back.

    Raises:
        CorruptFile: It does not read.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, pa.ArrowException, SafetensorError, LookupError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0][:300] or type(error).__name__
        raise CorruptFile(f"{path} cannot be read ({reason}). {remedy}") from error


def read_table(
    path: Path, schema: pa.Schema, remedy: str, *, required: Collection[str], columns: Sequence[str] | None = None
) -> pa.Table:
    """Return a Parquet file as a table with the columns of `schema`, in its types.

    Args:
        path: The file.
        schema: What it should hold; other columns are kept.
        remedy: A sentence on how to get the file back.
        required: Columns that must be there and hold no null; others are null where they are missing.
        columns: Only these.

    Raises:
        CorruptFile: It does not read, or is not such a table.
    """
    with reading(path, remedy):
        table = parquet.read_table(path, columns=None if columns is None else list(columns), memory_map=False)
    wanted = schema if columns is None else pa.schema([schema.field(name) for name in columns])
    for field in wanted:
        if field.name not in table.column_names:
            if field.name in required:
                raise CorruptFile(f"{path} lacks the columns {field.name}. {remedy}")
            table = table.append_column(field, pa.nulls(len(table), field.type))
            continue
        column = table[field.name]
        if column.type != field.type:
            with reading(path, remedy):
                column = column.cast(field.type)
            table = table.set_column(table.column_names.index(field.name), field, column)
        if field.name in required and column.null_count:
            row = compute.index(column.is_null(), True).as_py()  # pyright: ignore[reportAttributeAccessIssue]
            raise CorruptFile(f"{path}, row {row}: `{field.name}` is empty. {remedy}")
    return table


def write_table(path: Path, table: pa.Table, **options: Any) -> Written:
    """Write a Parquet file, whole or not at all; `options` are those of pyarrow's own `write_table`."""
    sink = io.BytesIO()
    parquet.write_table(table, sink, **options)
    return write_durably(path, [sink.getbuffer()])
