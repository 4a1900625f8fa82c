"""Some rows of a data source, written in the format that the source has."""

import csv
import io
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet

from vestige.data._load import load_examples, load_records
from vestige.data._records import OnBadText, Record, as_plain, parse_record
from vestige.data._sources import data_extension, open_source
from vestige.data._stored import record_of
from vestige.data._types import Example
from vestige.errors import DataError
from vestige.storage import write_durably
from vestige.tables import write_table

_LINES = (".jsonl", ".ndjson")


def record_line(example: Example, columns: Mapping[str, Any]) -> bytes:
    """Return a row as a JSON line with its own columns and its id, which a row without one has from its number."""
    if columns.get("id") in (None, ""):
        columns = {"id": example.id} | {name: value for name, value in columns.items() if name != "id"}
    return (json.dumps(columns, ensure_ascii=False, default=as_plain) + "\n").encode()


def write_rows(
    source: Any,
    kept: Collection[int],
    folder: Path,
    stem: str,
    *,
    where: Mapping[str, Any] | None = None,
    on_bad_text: OnBadText = "refuse",
) -> Path:
    """Write some rows of a source, in its order, into a new file `stem` in the folder, and return the file.

    It has the format of the source where that is one file and reads back as the same rows; else it is JSON lines. Lines
    of JSON stay as they stand. A file of this name is replaced.

    Args:
        source: As for `load_examples`.
        kept: Numbers of the rows.
        folder: Where to write.
        stem: Name of the file without its extension, which follows from the format.
        where: As for `load_examples`: the rows are numbered among those that it leaves.
        on_bad_text: As for `load_examples`.

    Raises:
        DataError: The source does not read, or no form holds its rows.
    """
    reading: dict[str, Any] = {"where": where, "on_bad_text": on_bad_text}
    wanted = [example for example in load_examples(source, **reading) if example.row in kept]
    extension = _extension_of(source)
    # Lines of a source with broken letters are written as they are read: replaced.
    for form in [extension, ""] if extension and on_bad_text == "refuse" else [""]:
        path = folder / f"{stem}{form or '.jsonl'}"
        if form:
            _write_alike(path, source, [one for one in open_source(source, where=where).records if one.row in kept])
        else:
            chosen = (each for each in load_records(source, **reading) if each[0].row in kept)
            write_durably(path, (record_line(example, columns) for example, columns in chosen))
        if _alike(load_examples(path), wanted):
            return path
    raise DataError(f"{source}: its rows read back differently when they are written. Save them as JSONL first.")


def _extension_of(source: Any) -> str:
    """Return the extension of a source that is one file; empty for any other."""
    is_file = isinstance(source, str | Path) and Path(source).expanduser().is_file()
    return (data_extension(source) or "") if is_file else ""


def _write_alike(path: Path, source: str | Path, records: Sequence[Record]) -> None:
    """Write the records of a file into another of its format."""
    if path.suffix == ".parquet":
        rows = [record.source_row for record in records]
        write_table(path, parquet.read_table(Path(source).expanduser(), memory_map=False).take(rows))
    elif path.suffix in _LINES:
        write_durably(path, ((record.value.rstrip("\r\n") + "\n").encode() for record in records))
    elif path.suffix == ".json":
        values = [parse_record(record).value for record in records]
        write_durably(path, [json.dumps(values, ensure_ascii=False, indent=1).encode()])
    else:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(records[0].value), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(record.value for record in records)
        write_durably(path, [text.getvalue().encode()])


def _alike(found: Sequence[Example], wanted: Sequence[Example]) -> bool:
    """Return whether two sequences hold the same rows; one without an id has its number for one, which moves."""

    def content(example: Example) -> dict[str, Any]:
        return record_of(replace(example, id="" if example.id.isdecimal() else example.id, row=0), 0)

    return list(map(content, found)) == list(map(content, wanted))
