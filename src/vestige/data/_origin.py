"""Records as a reader returns them, and the words that name them in an error."""

import difflib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from vestige.errors import DataError
from vestige.parsing import parse_json


class Record(NamedTuple):
    """One record as the source holds it, before it is known which columns matter."""

    value: Any
    """A mapping of columns, or a bare string; with `unparsed`, the text of a line of JSON."""
    line: int | None = None
    """Line of the file where the record starts, counted from 1, for formats that have lines."""
    unparsed: Path | None = None
    """The file, where `value` is a line that `parsed` has yet to read: so that other processes may."""
    file: str | None = None
    """The file's name, where a source has several."""


class Source(NamedTuple):
    """Records in their order, and the name of their origin."""

    name: str
    records: Iterable[Record]
    identity: str | None = None
    """Changes whenever the content may have changed; None where this is unknown, as of a list in memory."""


def file_identity(path: Path) -> str:
    """Return name, size and time of the last change, which identify the state of a file without reading it."""
    state = path.stat()
    return f"{path.name} {state.st_size} {state.st_mtime_ns}"


def parsed(record: Record) -> Record:
    """Return the record with its columns.

    Raises:
        DataError: Its line is not JSON.
    """
    if record.unparsed is None:
        return record
    try:
        return Record(parse_json(record.value), record.line, file=record.file)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{record.unparsed}, line {record.line}: not valid JSON: {error.msg} at column {error.colno}. The line is "
            f'{shown(record.value.strip())}; each line must be one object such as {{"text": "..."}}.'
        ) from error


def place(name: str, row: int, record: Record | None = None) -> str:
    """Return the position of a record, for an error message: `train.jsonl, row 3 (line 5)`; rows count from 0."""
    known = [] if record is None else [record.file, None if record.line is None else f"line {record.line}"]
    inside = ", ".join(part for part in known if part)
    return f"{name}, row {row} ({inside})" if inside else f"{name}, row {row}"


def shown(value: object, width: int = 60) -> str:
    """Cut a value to `width` characters, as Python would write it."""
    text = repr(value)
    return text if len(text) <= width else text[: width - 3] + "..."


def nearest_name(path: Path) -> str | None:
    """Return the entry of the path's folder whose name is most like the path's, or None when nothing is close."""
    try:
        names = [entry.name for entry in path.parent.iterdir() if not entry.name.startswith(".")]
    except OSError:
        return None
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.6)
    return str(path.parent / close[0]) if close else None
