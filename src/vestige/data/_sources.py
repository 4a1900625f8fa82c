"""Readers of every kind of source: files and folders of rows, data sets of the `datasets` library, names on the hub."""

import codecs
import csv
import difflib
import gzip
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from glob import glob, has_magic
from pathlib import Path
from typing import Any, TextIO

from vestige.data._records import Record, Source, quote
from vestige.errors import DataError
from vestige.parsing import parse_json
from vestige.progress import announce

# A training text in a CSV cell easily passes the default of 131,072 characters.
_CSV_CELL_LIMIT = 2**31 - 1

_PREPARED = "prepare.json"
"""The record that `vestige data` writes beside its rows."""
HUB_NAME = re.compile(r"(?P<path>[A-Za-z0-9][\w.-]*(/[\w.-]+)?)(:(?P<config>[\w.-]+))?")
"""`name`, `owner/name`, and either with `:config` behind it."""


def open_source(source: Any, split: str | None) -> Source:
    """Return the reader for a source of any kind.

    Raises:
        DataError: There is no such source.
    """
    if isinstance(source, str | Path):
        return _open_path(source, split)
    if _is_dataset(source):
        return _from_dataset(source, split)
    if isinstance(source, list | tuple):
        _refuse_split("a list", split)
        if source and all(isinstance(item, Path) for item in source):
            return _read_files(f"{len(source)} files", source)
        return Source("the list", map(Record, source))
    raise DataError(
        f"Data of type {type(source).__name__} cannot be read ({quote(source)}). Give a path, a hub id, "
        "a `datasets.Dataset`, or a list of dictionaries."
    )


def _open_path(source: str | Path, split: str | None) -> Source:
    if not str(source).strip():
        raise DataError("The path of the data is empty. Give a file, a folder or a hub id.")
    path = Path(source).expanduser()
    if path.is_dir() and any((path / marker).exists() for marker in ("state.json", "dataset_dict.json")):
        return _from_folder(path, split)
    several = _files_of_folder(path) if path.is_dir() else [] if exists(str(path)) else matching_files(path)
    if several:
        _refuse_split(str(source), split)
        if len(several) == 1:
            return read_file(several[0])
        announce(f"{source}: {len(several)} files, from {several[0].name} to {several[-1].name}.")
        return _read_files(str(source), several)
    if not exists(str(path)) and _can_be_hub_id(source) and (match := HUB_NAME.fullmatch(str(source))):
        return _from_hub(match, split)
    if not exists(str(path)):
        raise DataError(_absent_file(path))
    _refuse_split(path.name, split)
    return read_file(path)


def require_data(source: Any) -> None:
    """Raise if data is a path, or a list of paths, where there is nothing; a hub id and rows are taken as they are.

    Raises:
        DataError: As `open_source`.
    """
    several = isinstance(source, list | tuple) and all(isinstance(item, Path) for item in source)
    for each in source if several else [source]:
        if not isinstance(each, str | Path) or not str(each).strip() or exists(str(each)):
            continue
        path = Path(each).expanduser()
        if not (matching_files(path) or _can_be_hub_id(each)):
            raise DataError(_absent_file(path))


def _can_be_hub_id(source: str | Path) -> bool:
    return isinstance(source, str) and data_extension(Path(source)) is None and HUB_NAME.fullmatch(source) is not None


def exists(text: str) -> bool:
    """Return whether a text is a path that exists."""
    try:
        return bool(text.strip()) and Path(text).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # too long for a file name, a null byte, an unknown home
        return False


def _refuse_split(name: str, split: str | None) -> None:
    if split is not None:
        raise DataError(f"split={split!r} was requested, but {name} has no splits. Leave it out.")


def read_file(path: Path) -> Source:
    """Read the records of one file lazily; its extension decides the format (`.gz` may follow it)."""
    if not path.exists():
        raise DataError(_absent_file(path))
    extension = data_extension(path)
    if extension is None:
        known = ", ".join(_READERS)
        raise DataError(
            f"{path}: the extension {path.suffix or '(none)'!r} is not one that can be read. "
            f"Give a file ending in {known}, or a folder saved by `datasets.save_to_disk`."
        )
    state = path.stat()
    # Name, size and time of the last change identify the state of a file without reading it.
    identity = f"{path.name} {state.st_size} {state.st_mtime_ns}"
    return Source(path.name, _explain_errors(path, _READERS[extension]), identity)


def _read_files(name: str, paths: Sequence[Path]) -> Source:
    """Return the records of one file after another, as a source of this name."""
    sources = [read_file(path) for path in paths]
    records = (record._replace(file=source.name) for source in sources for record in source.records)
    return Source(name, records, " ".join(str(source.identity) for source in sources))


def _files_of_folder(folder: Path) -> list[Path]:
    """Return the data files of a folder, all of one kind; of what `vestige data` left, the file with the rows."""
    files = sorted(path for path in folder.iterdir() if data_extension(path))
    if (folder / _PREPARED).is_file():
        rows = [path for path in files if path.stem == "data"]
        if not rows:
            parts = ", ".join(path.name for path in files if path.name != _PREPARED) or "none"
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
    return extension if extension in _READERS else None


def _absent_file(path: Path) -> str:
    """Return the message for a path that does not exist, with the nearest name that does."""
    if not path.parent.exists():
        return f"{path}: no such file; the folder {path.parent} does not exist either."
    try:
        names = [entry.name for entry in path.parent.iterdir() if not entry.name.startswith(".")]
    except OSError:
        names = []
    near = next((str(path.parent / name) for name in difflib.get_close_matches(path.name, names, n=1)), None)
    hint = f"Did you mean {near}?" if near else f"The folder {path.parent.resolve()} holds nothing of a similar name."
    return f"{path}: no such file. {hint}"


def _explain_errors(path: Path, reader: Callable[[Path], Iterator[Record]]) -> Iterator[Record]:
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
    given = f"an object with the keys {', '.join(map(str, value))}" if isinstance(value, dict) else quote(value)
    raise DataError(
        f'{path}: expected a list of rows or an object {{"data": [...]}}, got {given}. '
        "Put the rows into a list: [{...}, {...}]."
    )


def _read_cells(delimiter: str, path: Path) -> Iterator[Record]:
    """Yield the rows of a table with a header line; every cell is a string, quoted cells may span lines."""
    csv.field_size_limit(_CSV_CELL_LIMIT)
    with _open_text(path) as stream:
        rows = csv.reader(stream, delimiter=delimiter, strict=True)
        try:
            header = _check_header(path, next(rows, []))
            line = rows.line_num + 1
            for cells in rows:
                if cells:
                    yield Record(_check_cells(path, line, header, cells), line)
                line = rows.line_num + 1
        except csv.Error as error:
            kind = str(data_extension(path))[1:].upper()
            raise DataError(
                f"{path}, line {rows.line_num}: not valid {kind}: {error}. A cell with quotes, "
                'line breaks or separators is written "so, with ""quotes"" doubled".'
            ) from error


def _check_header(path: Path, names: list[str]) -> list[str]:
    header = [name.strip() for name in names]
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(f"{path}, line 1: the header names {quote(twice[0])} more than once; rename one of them.")
    return header


def _check_cells(path: Path, line: int, header: list[str], cells: list[str]) -> dict[str, str]:
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


_READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".csv": partial(_read_cells, ","),
    ".tsv": partial(_read_cells, "\t"),
    ".parquet": _read_parquet,
}


def _is_dataset(source: object) -> bool:
    """Return whether `source` is a data set of the `datasets` library, without importing it."""
    is_its_own = any(base.__module__.split(".")[0] == "datasets" for base in type(source).__mro__)
    return is_its_own and hasattr(source, "with_format")


def _from_dataset(dataset: Any, split: str | None, name: str = "dataset") -> Source:
    """Return the rows of a live data set, of any output format; of a dictionary of splits, one split."""
    if isinstance(dataset, Mapping):
        split = _choose_split(list(dataset), split, name)
        name, dataset = f"{name}[{split}]", dataset[split]
    elif split is not None and str(getattr(dataset, "split", None)) != split:
        raise DataError(f"{name}: split={split!r} was requested, but the source is one data set without splits.")
    # A format such as "torch" would turn ids and labels into tensors. The library gives every data set a fingerprint of
    # its content and of what was done to it.
    return Source(name, map(Record, dataset.with_format(None)), getattr(dataset, "_fingerprint", None))


def _choose_split(names: list[str], split: str | None, name: str) -> str:
    if split is not None:
        if split not in names:
            raise DataError(f"{name}: no split {split!r}; its splits are {', '.join(names)}.")
        return split
    if len(names) == 1:
        return names[0]
    if "train" in names:
        announce(f"{name}: reading the split 'train' (of {', '.join(names)}); choose another with split=...")
        return "train"
    raise DataError(f"{name}: which of its splits ({', '.join(names)})? Type split={names[0]!r}.")


def _from_folder(folder: Path, split: str | None) -> Source:
    """Return the rows of a folder written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        dataset = datasets.load_from_disk(str(folder))
    except (AttributeError, LookupError, OSError, TypeError, ValueError, DatasetsError) as error:
        raise DataError(f"{folder}: looks like a folder saved by `datasets`, but does not load ({error}).") from error
    return _from_dataset(dataset, split, folder.name)


def _from_hub(match: re.Match[str], split: str | None) -> Source:
    """Return the rows of a hub data set, `owner/name` or `owner/name:config`, downloaded or from the cache."""
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        dataset = datasets.load_dataset(match["path"], match["config"], split=split)
    except (OSError, ValueError, RuntimeError, ImportError, DatasetsError) as error:
        raise DataError(_hub_failure(match.string, error)) from error
    return _from_dataset(dataset, None, match.string)


def _hub_failure(name: str, error: Exception) -> str:
    reason = str(error).strip().split("\n")[0].rstrip(".")
    message = f"{_absent_file(Path(name))} It was not loaded from the hub either: {reason}."
    if "onfig" in reason:
        return f"{message} Choose a config by writing {name.split(':')[0]}:CONFIG."
    if isinstance(error, ConnectionError):
        return f"{message} Check the network, or give a local file."
    return f"{message} Check the name, and log in with `hf auth login` if the data set is private."
