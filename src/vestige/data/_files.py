"""Readers of one file each: JSON lines, JSON, CSV, TSV and Parquet, all yielding records one at a time."""

import codecs
import csv
import gzip
import io
import json
from collections.abc import Callable, Iterator, Sequence
from glob import glob, has_magic
from pathlib import Path
from typing import Any, TextIO

from vestige.data._origin import Record, Source, file_identity, nearest_name, shown
from vestige.errors import DataError
from vestige.parsing import parse_json

# A training text in a CSV cell easily passes the default of 131,072 characters.
CSV_CELL_LIMIT = 2**31 - 1

PREPARED = "prepare.json"
"""The record that `vestige data` writes beside its rows."""


def read_file(path: Path) -> Source:
    """Read the records of one file lazily; its extension decides the format (`.gz` may follow it).

    Raises:
        DataError: The file is absent, its extension is unknown, or (while reading) its content is broken.
    """
    if not path.exists():
        raise DataError(absent_file(path))
    extension = data_extension(path)
    if extension is None:
        known = ", ".join(READERS)
        raise DataError(
            f"{path}: the extension {path.suffix or '(none)'!r} is not one that can be read. "
            f"Give a file ending in {known}, or a folder saved by `datasets.save_to_disk`."
        )
    return Source(path.name, _explained(path, READERS[extension]), file_identity(path))


def read_files(name: str, paths: Sequence[Path]) -> Source:
    """Return the records of one file after another, as a source of this name.

    Raises:
        DataError: As for `read_file`.
    """
    sources = [read_file(path) for path in paths]
    records = (record._replace(file=source.name) for source in sources for record in source.records)
    return Source(name, records, " ".join(str(source.identity) for source in sources))


def files_of_folder(folder: Path) -> list[Path]:
    """Return the data files of a folder by name, all of one kind; of what `vestige data` left, the file with the rows.

    Raises:
        DataError: There is none, or they are of several kinds.
    """
    files = sorted(path for path in folder.iterdir() if data_extension(path))
    if (folder / PREPARED).is_file():
        rows = [path for path in files if path.stem == "data"]
        if not rows:
            parts = ", ".join(path.name for path in files if path.name != PREPARED) or "none"
            raise DataError(f"{folder}: `vestige data` left several files of rows here ({parts}). Give one of them.")
        return rows[:1]
    if not files:
        raise DataError(
            f"{folder}: a folder that neither holds data files nor was saved by `datasets.save_to_disk`. Give a data "
            "file, or save the data set with `dataset.save_to_disk(...)`."
        )
    if len(kinds := {data_extension(path) for path in files}) > 1:
        raise DataError(
            f"{folder}: holds files of several kinds ({', '.join(sorted(map(str, kinds)))}). Name those to read, for "
            f"example {folder / '*'}{data_extension(files[0])} in quotation marks."
        )
    return files


def matching_files(pattern: Path) -> list[Path]:
    """Return the files that a pattern such as `parts/*.jsonl` stands for, by name; none if it is no pattern."""
    try:
        found = glob(str(pattern), recursive=True) if has_magic(str(pattern)) else []
    except (OSError, ValueError):  # too long for a file name, a null byte
        return []
    return [path for path in map(Path, sorted(found)) if path.is_file()]


def data_extension(path: Path) -> str | None:
    """Return the extension that names the format, in lower case and without `.gz`; None if no reader knows it."""
    name = path.name.lower().removesuffix(".gz")
    extension = Path(name).suffix
    return extension if extension in READERS else None


def absent_file(path: Path) -> str:
    """Return the message for a path that does not exist, with the nearest name that does."""
    if not path.parent.exists():
        return f"{path}: no such file; the folder {path.parent} does not exist either."
    near = nearest_name(path)
    hint = f"Did you mean {near}?" if near else f"The folder {path.parent.resolve()} holds nothing of a similar name."
    return f"{path}: no such file. {hint}"


def _explained(path: Path, reader: Callable[[Path], Iterator[Record]]) -> Iterator[Record]:
    """Yield the reader's records; errors of the operating system or the decoder become a DataError."""
    try:
        yield from reader(path)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 text (byte {error.start} is {error.object[error.start]:#04x}). "
            f"Save it again as UTF-8, for example: iconv -f {_encoding(error.object)} -t utf-8 {path.name}"
        ) from error
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}).") from error


def _encoding(content: bytes) -> str:
    """Return the encoding of text that is not UTF-8, by its first bytes, if it is UTF-16 or UTF-32."""
    if content.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    return "latin1"


def _open_text(path: Path) -> TextIO:
    """Open the file as text, unpacked if it ends in `.gz`; a byte order mark at its start is dropped."""
    if path.name.lower().endswith(".gz"):
        return io.TextIOWrapper(gzip.open(path, "rb"), encoding="utf-8-sig", newline="")
    return open(path, encoding="utf-8-sig", newline="")


def _read_json_lines(path: Path) -> Iterator[Record]:
    """Yield one JSON value per line, not parsed yet; blank lines are skipped but counted."""
    with _open_text(path) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield Record(line, number, unparsed=path)


def _read_json(path: Path) -> Iterator[Record]:
    """Yield the rows of a list, or of an object whose `data` is a list; several objects are read as JSON lines."""
    with _open_text(path) as stream:
        content = stream.read()
    if not content.strip():
        return
    try:
        value = parse_json(content)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from _read_json_lines(path)
            return
        raise DataError(f"{path}, line {error.lineno}: not valid JSON: {error.msg} at column {error.colno}.") from error
    yield from map(Record, _rows_of_json(path, value))


def _rows_of_json(path: Path, value: Any) -> list[Any]:
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        return value["data"]
    if isinstance(value, list):
        return value
    given = f"an object with the keys {', '.join(map(str, value))}" if isinstance(value, dict) else shown(value)
    raise DataError(
        f'{path}: expected a list of rows or an object {{"data": [...]}}, got {given}. '
        "Put the rows into a list: [{...}, {...}]."
    )


def _read_csv(path: Path) -> Iterator[Record]:
    return _read_cells(path, ",")


def _read_tsv(path: Path) -> Iterator[Record]:
    return _read_cells(path, "\t")


def _read_cells(path: Path, delimiter: str) -> Iterator[Record]:
    """Yield the rows of a table with a header line; every cell is a string, quoted cells may span lines."""
    csv.field_size_limit(CSV_CELL_LIMIT)
    with _open_text(path) as stream:
        rows = csv.reader(stream, delimiter=delimiter, strict=True)
        try:
            header = _checked_header(path, next(rows, []))
            line = rows.line_num + 1
            for cells in rows:
                if cells:
                    yield Record(_checked_cells(path, line, header, cells), line)
                line = rows.line_num + 1
        except csv.Error as error:
            kind = str(data_extension(path))[1:].upper()
            raise DataError(
                f"{path}, line {rows.line_num}: not valid {kind}: {error}. A cell with quotes, "
                'line breaks or separators is written "so, with ""quotes"" doubled".'
            ) from error


def _checked_header(path: Path, names: list[str]) -> list[str]:
    header = [name.strip() for name in names]
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(f"{path}, line 1: the header names {shown(twice[0])} more than once; rename one of them.")
    return header


def _checked_cells(path: Path, line: int, header: list[str], cells: list[str]) -> dict[str, str]:
    if len(cells) != len(header):
        raise DataError(
            f"{path}, line {line}: {len(cells)} cells, but the header has {len(header)} "
            f"({', '.join(header)}). "
            'Put quotes round cells that hold the separator: "like, this".'
        )
    return dict(zip(header, cells, strict=True))


def _read_parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=4096):
                yield from map(Record, batch.to_pylist())
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path}: not a Parquet file that can be read ({error}).") from error


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}
