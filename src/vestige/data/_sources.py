"""Readers of every kind of source: files and folders of rows, data sets of the `datasets` library, names on the hub."""

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vestige.data._files import Place, exists, extension_of, locate
from vestige.data._records import Record, Source, number_records, quote
from vestige.errors import DataError
from vestige.parsing import parse_json
from vestige.progress import announce

# A training text in a CSV cell easily passes the default of 131,072 characters.
_CSV_CELL_LIMIT = 2**31 - 1

_PREPARED = "prepare.json"
"""The record that `vestige data` writes beside its rows."""
HUB_NAME = re.compile(r"(?P<path>[A-Za-z0-9][\w.-]*(/[\w.-]+)?)(:(?P<config>[\w.-]*)(:(?P<split>[\w.-]+))?)?")
"""`name` or `owner/name`, and either with `:config`, `:config:split` or `::split` behind it."""


def open_source(
    source: Any, split: str | None = None, *, limit: int | None = None, where: Mapping[str, Any] | None = None
) -> Source:
    """Return the reader for a source of any kind, with the rest as for `load_examples`.

    Raises:
        DataError: There is no such source.
    """
    # Of a stream no more is fetched than the limit needs; where a column decides, how much that is is not known.
    opened = _open(source, split, None if where else limit)
    identity = None if opened.identity is None else f"{opened.identity} limit {limit}"
    if identity is not None and where:
        identity += f" where {sorted(where.items())}"
    return Source(opened.name, number_records(opened, limit, where), identity)


def _open(source: Any, split: str | None, limit: int | None) -> Source:
    if isinstance(source, str | Path):
        return _open_path(source, split, limit)
    if _is_dataset(source):
        return _from_dataset(source, split, limit)
    if isinstance(source, list | tuple):
        _refuse_split("a list", split)
        if source and all(isinstance(item, Path) for item in source):
            return _read_files(f"{len(source)} files", [locate(item) for item in source])
        return Source("the list", map(Record, source))
    raise DataError(
        f"Data of type {type(source).__name__} cannot be read ({quote(source)}). Give a path, a hub id, "
        "a `datasets.Dataset`, or a list of dictionaries."
    )


def _open_path(source: str | Path, split: str | None, limit: int | None) -> Source:
    if not str(source).strip():
        raise DataError("The path of the data is empty. Give a file, a folder or a hub id.")
    place = locate(source)
    kind = place.kind
    folder, _, part = str(source).rpartition("::")
    if kind is None and folder and _is_saved(locate(folder)):
        return _open_path(folder, part, limit)
    if _is_saved(place):
        return _from_folder(place, split)
    several = _files_of_folder(place) if kind == "directory" else [] if kind else place.matches()
    if several:
        _refuse_split(str(source), split)
        if len(several) == 1:
            return read_file(several[0])
        announce(f"{source}: {len(several)} files, from {several[0].name} to {several[-1].name}.")
        return _read_files(str(source), several)
    if kind is None and _can_be_hub_id(source) and (match := HUB_NAME.fullmatch(str(source))):
        return _from_hub(match, split, limit)
    if kind is None:
        raise DataError(place.absent())
    _refuse_split(place.name, split)
    return read_file(place)


def require_data(source: Any) -> None:
    """Raise if data is a path, or a list of paths, where there is nothing; a hub id and rows are taken as they are.

    Raises:
        DataError: As `open_source`.
    """
    several = isinstance(source, list | tuple) and all(isinstance(item, Path) for item in source)
    for each in source if several else [source]:
        if not isinstance(each, str | Path) or not str(each).strip() or exists(str(each)):
            continue
        if not (locate(each).matches() or _can_be_hub_id(each) or exists(str(each).rpartition("::")[0])):
            raise DataError(locate(each).absent())


def _can_be_hub_id(source: str | Path) -> bool:
    return isinstance(source, str) and data_extension(source) is None and HUB_NAME.fullmatch(source) is not None


def _is_saved(place: Place) -> bool:
    """Return whether `datasets` saved the folder."""
    markers = {"state.json", "dataset_dict.json"}
    return place.kind == "directory" and not markers.isdisjoint(each.name for each in place.inside())


def _refuse_split(name: str, split: str | None) -> None:
    if split is not None:
        raise DataError(f"split={split!r} was requested, but {name} has no splits. Leave it out.")


def read_file(place: Place) -> Source:
    """Read the records of one file lazily; its extension decides the format, before that of a packed file."""
    if place.kind is None:
        raise DataError(place.absent())
    reader = _READERS.get(extension_of(place.name))
    if reader is None:
        return _read_by_library(place)
    return Source(place.name, _explain_errors(place, reader), place.identity)


def _read_files(name: str, places: Sequence[Place]) -> Source:
    """Return the records of one file after another, as a source of this name."""
    sources = [read_file(place) for place in places]
    records = (record._replace(file=source.name) for source in sources for record in source.records)
    return Source(name, records, " ".join(str(source.identity) for source in sources))


def _files_of_folder(folder: Place) -> list[Place]:
    """Return the data files of a folder, all of one kind; of what `vestige data` left, the file with the rows."""
    inside = folder.inside()
    files = [place for place in inside if data_extension(place.name)]
    if _PREPARED in [place.name for place in inside]:
        rows = [place for place in files if Path(place.name).stem == "data"]
        if not rows:
            parts = ", ".join(place.name for place in files if place.name != _PREPARED) or "none"
            raise DataError(
                f"{folder.shown}: `vestige data` left several files of rows here ({parts}). Give one of them."
            )
        return rows[:1]
    if not files:
        raise DataError(
            f"{folder.shown}: a folder that neither holds data files nor was saved by `datasets.save_to_disk`. Give a "
            "data file, or save the data set with `dataset.save_to_disk(...)`."
        )
    if len(kinds := {extension_of(place.name) for place in files}) > 1:
        raise DataError(
            f"{folder.shown}: holds files of several kinds ({', '.join(sorted(kinds))}). Name those to read, for "
            f"example {folder.shown}/*{extension_of(files[0].name)} in quotation marks."
        )
    return files


def data_extension(source: str | Path) -> str | None:
    """Return the extension that names the format, in lower case; None if no reader of this module knows it."""
    extension = extension_of(Path(source).name)
    return extension if extension in _READERS else None


def _explain_errors(place: Place, reader: Callable[[Place], Iterator[Record]]) -> Iterator[Record]:
    """Yield the reader's records; errors of the operating system or the decoder become a DataError."""
    with place.reading():
        yield from reader(place)


def _read_json_lines(place: Place) -> Iterator[Record]:
    """Yield one JSON value per line, not parsed yet; blank lines are skipped but counted."""
    with place.open_text() as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield Record(line, number, unparsed=place.shown)


def _read_json(place: Place) -> Iterator[Record]:
    """Yield the rows of a list, or of an object whose `data` is a list; several objects are read as JSON lines."""
    with place.open_text() as stream:
        content = stream.read()
    if not content.strip():
        return
    try:
        value = parse_json(content)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from _read_json_lines(place)
            return
        raise DataError(
            f"{place.shown}, line {error.lineno}: not valid JSON: {error.msg} at column {error.colno}."
        ) from error
    rows = value.get("data") if isinstance(value, dict) else value
    if not isinstance(rows, list):
        given = f"an object with the keys {', '.join(map(str, value))}" if isinstance(value, dict) else quote(value)
        raise DataError(
            f'{place.shown}: expected a list of rows or an object {{"data": [...]}}, got {given}. '
            "Put the rows into a list: [{...}, {...}]."
        )
    yield from map(Record, rows)


def _read_cells(place: Place) -> Iterator[Record]:
    """Yield the rows of a table with a header line; every cell is a string, quoted cells may span lines."""
    csv.field_size_limit(_CSV_CELL_LIMIT)
    kind = extension_of(place.name)[1:].upper()
    with place.open_text() as stream:
        rows = csv.reader(stream, delimiter="\t" if kind == "TSV" else ",", strict=True)
        try:
            header = [name.strip() for name in next(rows, [])]
            if twice := sorted({name for name in header if header.count(name) > 1}):
                raise DataError(
                    f"{place.shown}, line 1: the header names {quote(twice[0])} more than once; rename one of them."
                )
            line = rows.line_num + 1
            for cells in rows:
                if cells and len(cells) != len(header):
                    raise DataError(
                        f"{place.shown}, line {line}: {len(cells)} cells, but the header has {len(header)} "
                        f'({", ".join(header)}). Put quotes round cells that hold the separator: "like, this".'
                    )
                if cells:
                    yield Record(dict(zip(header, cells, strict=True)), line)
                line = rows.line_num + 1
        except csv.Error as error:
            raise DataError(
                f"{place.shown}, line {rows.line_num}: not valid {kind}: {error}. A cell with quotes, "
                'line breaks or separators is written "so, with ""quotes"" doubled".'
            ) from error


def _read_parquet(place: Place) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        with place.open() as content, pyarrow.parquet.ParquetFile(content) as file:
            for batch in file.iter_batches(batch_size=4096):
                yield from map(Record, batch.to_pylist())
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{place.shown}: not a Parquet file that can be read ({error}).") from error


_READERS: dict[str, Callable[[Place], Iterator[Record]]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_cells,
    ".tsv": _read_cells,
    ".parquet": _read_parquet,
}
"""What is read here, for the line and the row in errors; `datasets` reads the other formats."""


def _read_by_library(place: Place) -> Source:
    """Return the rows of a file in one of the other formats that `datasets` reads, from its cache of Arrow files."""
    import datasets
    from datasets.packaged_modules import _EXTENSION_TO_MODULE

    if extension_of(place.name) not in _EXTENSION_TO_MODULE:
        raise DataError(
            f"{place.shown}: the extension {Path(place.name).suffix or '(none)'!r} is not one that can be read. Give a "
            f"file ending in {', '.join(_READERS)}, .txt, .arrow or another format of `datasets`, or a folder saved by "
            "`datasets.save_to_disk`."
        )
    module, options = _EXTENSION_TO_MODULE[extension_of(place.name)]
    # Nothing of the file decides what is run: the module is one of the library's own.
    try:
        dataset = datasets.load_dataset(module, data_files=[place.shown], split="train", **options)
    except Exception as error:
        # Each format has a library of its own, with errors of its own.
        reason = str(error.__cause__ or error).strip().split("\n")[0]
        raise DataError(f"{place.shown}: `datasets` does not read it as {module} ({reason}).") from error
    return _from_dataset(dataset, None, None, place.name)._replace(identity=place.identity)


def _is_dataset(source: object) -> bool:
    """Return whether `source` is a data set of the `datasets` library, without importing it."""
    is_its_own = any(base.__module__.split(".")[0] == "datasets" for base in type(source).__mro__)
    return is_its_own and hasattr(source, "with_format")


def _from_dataset(dataset: Any, split: str | None, limit: int | None, name: str = "dataset") -> Source:
    """Return the rows of a live data set, of any output format; of a dictionary of splits, one split."""
    if isinstance(dataset, Mapping):
        split = _choose_split(list(dataset), split, name)
        name, dataset = f"{name}[{split}]", dataset[split]
    elif split is not None and str(getattr(dataset, "split", None)) != split:
        raise DataError(f"{name}: split={split!r} was requested, but the source is one data set without splits.")
    if not hasattr(dataset, "__len__"):
        dataset = _materialise(dataset, limit, name)
    # A format such as "torch" would turn ids and labels into tensors. The library gives every data set a fingerprint of
    # its content and of what was done to it.
    return Source(name, map(Record, dataset.with_format(None)), dataset._fingerprint)


def _materialise(stream: Any, limit: int | None, name: str) -> Any:
    """Return the rows of a stream as a data set in the cache of `datasets`, where they are found again."""
    import datasets
    from datasets.exceptions import DatasetsError

    # One row more than is used: a message says that the rest is left out.
    rows = stream.with_format(None) if limit is None else stream.with_format(None).take(limit + 1)
    try:
        return datasets.Dataset.from_generator(_rows_of, features=stream.features, gen_kwargs={"stream": rows})
    except DatasetsError as error:
        raise DataError(
            f"{name}: the stream does not become a table ({error.__cause__ or error}). Where columns hold values of "
            "several types, give it its `features`."
        ) from error


def _rows_of(stream: Any) -> Iterator[dict[str, Any]]:
    yield from stream


def _choose_split(names: list[str], split: str | None, name: str) -> str:
    if split is not None:
        if split not in names:
            raise DataError(f"{name}: no split {split!r}; its splits are {', '.join(names)}.")
        return split
    if len(names) == 1:
        return names[0]
    if "train" in names:
        announce(
            f"{name}: reading the split 'train' (of {', '.join(names)}); choose another with split=..., or behind the "
            "name (owner/name:config:SPLIT, or NAME::SPLIT)."
        )
        return "train"
    raise DataError(
        f"{name}: which of its splits ({', '.join(names)})? Type split={names[0]!r}, or write it behind the name: "
        f"{name}::{names[0]}."
    )


def _from_folder(folder: Place, split: str | None) -> Source:
    """Return the rows of a folder written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        dataset = datasets.load_from_disk(folder.shown)
    except (AttributeError, LookupError, OSError, TypeError, ValueError, DatasetsError) as error:
        raise DataError(
            f"{folder.shown}: looks like a folder saved by `datasets`, but does not load ({error})."
        ) from error
    return _from_dataset(dataset, split, None, folder.name)


def _from_hub(match: re.Match[str], split: str | None, limit: int | None) -> Source:
    """Return the rows of a hub data set, downloaded or from the cache; with a limit, only as many as that needs."""
    import datasets
    from datasets.exceptions import DatasetsError

    if split is not None and match["split"] not in (None, split):
        raise DataError(f"{match.string}: the name asks for another split than split={split!r}. Leave one of them out.")
    options: Any = {} if limit is None else {"streaming": True}
    try:
        dataset = datasets.load_dataset(
            match["path"], match["config"] or None, split=split or match["split"], **options
        )
        return _from_dataset(dataset, None, limit, match.string)
    except (OSError, ValueError, RuntimeError, ImportError, DatasetsError) as error:
        raise DataError(_hub_failure(match.string, error)) from error


def _hub_failure(name: str, error: Exception) -> str:
    reason = str(error).strip().split("\n")[0].rstrip(".")
    message = f"{locate(name).absent()} It was not loaded from the hub either: {reason}."
    if "onfig" in reason:
        return f"{message} Choose a config by writing {name.split(':')[0]}:CONFIG."
    if isinstance(error, ConnectionError):
        return f"{message} Check the network, or give a local file."
    return f"{message} Check the name, and log in with `hf auth login` if the data set is private."
