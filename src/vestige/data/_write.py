"""Some rows of a data source, written in the format that the source has."""

import csv
import io
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet

from vestige.data._load import load_examples, load_records, number_records
from vestige.data._records import OnBadText, parse_record
from vestige.data._sources import data_extension, open_source
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


def as_plain(value: Any) -> Any:
    """Return a value that JSON has no form for in one that it has."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)


def write_rows(
    source: Any, kept: Collection[int], folder: Path, stem: str, *, on_bad_text: OnBadText = "refuse"
) -> Path:
    """Write some rows of a source, in its order, into a new file `stem` in the folder, and return the file.

    It has the format of the source where that is one file and reads back as the same rows; else it is JSON lines. Lines
    of JSON stay as they stand. A file of this name is replaced.

    Args:
        source: As for `load_examples`.
        kept: Numbers of the rows.
        folder: Where to write.
        stem: Name of the file without its extension, which follows from the format.
        on_bad_text: As for `load_examples`.

    Raises:
        DataError: The source does not read, or no form holds its rows.
    """
    wanted = [example for example in load_examples(source, on_bad_text=on_bad_text) if example.row in kept]
    extension = _extension_of(source)
    # Lines of a source with broken letters are written as they are read: replaced.
    for form in [extension, ""] if extension and on_bad_text == "refuse" else [""]:
        path = folder / f"{stem}{form or '.jsonl'}"
        if form == ".parquet":
            write_table(path, parquet.read_table(Path(source).expanduser(), memory_map=False).take(sorted(kept)))
        else:
            write_durably(path, _chunks(source, form, kept, on_bad_text))
        if _alike(load_examples(path), wanted):
            return path
    raise DataError(f"{source}: its rows read back differently when they are written. Save them as JSONL first.")


def _extension_of(source: Any) -> str:
    """Return the extension of a source that is one file; empty for any other."""
    path = Path(source).expanduser() if isinstance(source, str | Path) else None
    return (data_extension(path) or "") if path is not None and path.is_file() else ""


def _chunks(source: Any, form: str, kept: Collection[int], on_bad_text: OnBadText) -> Iterator[bytes]:
    if not form:
        for example, columns in load_records(source, on_bad_text=on_bad_text):
            if example.row in kept:
                yield record_line(example, columns)
        return
    records = [one for one in number_records(open_source(source, None), None) if one.row in kept]
    if form in _LINES:
        yield from ((one.value.rstrip("\r\n") + "\n").encode() for one in records)
    elif form == ".json":
        values = [parse_record(one).value for one in records]
        yield json.dumps(values, ensure_ascii=False, indent=1).encode()
    else:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(records[0].value), delimiter="\t" if form == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(one.value for one in records)
        yield text.getvalue().encode()


def _alike(found: Sequence[Example], wanted: Sequence[Example]) -> bool:
    """Return whether two sequences hold the same rows; one without an id has its number for one, which moves."""

    def content(example: Example) -> str:
        name = "" if example.id.isdecimal() else example.id
        return json.dumps(vars(replace(example, id=name, row=0)), sort_keys=True, default=_content)

    return list(map(content, found)) == list(map(content, wanted))


def _content(value: Any) -> Any:
    return vars(value) if hasattr(value, "__dict__") else as_plain(value)
