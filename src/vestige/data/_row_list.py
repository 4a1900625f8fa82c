"""Lists that name rows of the data, as reports, selections, audits and people write them, read in one module."""

import csv
import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
from jaxtyping import Int

from vestige.data._records import as_plain
from vestige.data._types import Example, TokenizedData, hash_example
from vestige.errors import DataError
from vestige.parsing import parse_json
from vestige.progress import announce

COLUMNS = ("example_id", "id", "row")
"""Columns that name a row, the first that there is counting; `row` is its number, from 0."""
_FOLDERS = ("at_risk.parquet", "selected.parquet", "flagged.jsonl")
"""Lists that folders of `vestige train --alarm`, `vestige select` and `vestige data clean` hold."""
_NAMED = 5
"""Rows that an error lists."""
_FORMS = (
    "an id on each line; CSV, JSONL or Parquet with a column `example_id`, `id` or `row`; a JSON list of ids; or the "
    "folder of `vestige select`, `vestige data clean` or `vestige train --alarm`"
)


class RowEntry(NamedTuple):
    """One row of a list."""

    name: str
    """Its id, or its number."""
    about: Mapping[str, Any] = {}
    """The other columns of the list."""


def require_row_list(source: Any) -> None:
    """Raise if a path is given, and no list of rows is there.

    Raises:
        DataError: The path is not there, or a folder without one.
    """
    if isinstance(source, str | Path) and not (path := _list_in(Path(source).expanduser())).exists():
        raise DataError(f"{path} is not there. Expected a list of rows: {_FORMS}.")


def read_row_list(source: str | Path) -> list[RowEntry]:
    """Read every row that a list names, in its order; rows whose column `flagged` is false are left out.

    Raises:
        DataError: There is no list, it does not read as one, or it names nothing.
    """
    require_row_list(source)
    path = _list_in(Path(source).expanduser())
    try:
        entries = [_entry(value, place, path) for place, value in enumerate(_read_values(path), 1)]
    except (OSError, ValueError, RecursionError, csv.Error, pa.ArrowException) as error:
        raise DataError(f"{path} does not read as a list of rows: {error}. Expected {_FORMS}.") from error
    found = [entry for entry in entries if _is_meant(entry.about.get("flagged", True))]
    if not entries:
        raise DataError(f"{path} names no rows. Expected {_FORMS}.")
    return found


def rows_named(
    names: Sequence[str], ids: Sequence[str], *, place: str, data: str = "the data", partial: bool = False
) -> dict[str, int]:
    """Return the row of each name that a list has.

    Names are ids of the data. Only where none of them is, and all are whole numbers, are they row numbers, counted from
    0, which is announced. A spreadsheet's apostrophe before an id is taken off.

    Args:
        names: As the list has them.
        ids: Of the data, in row order.
        place: What the list is called.
        data: What the data are called.
        partial: Leave out names that are no ids, instead of refusing them, if some are.

    Raises:
        DataError: A name is no row; the message lists them.
    """
    if not names:
        return {}
    row_of = {name: row for row, name in enumerate(ids)}
    found = {name: row for name in names if (row := row_of.get(name, row_of.get(name.removeprefix("'")))) is not None}
    unknown = [name for name in dict.fromkeys(names) if name not in found]
    numbers = all(name.isdecimal() and name.isascii() for name in names)
    if numbers and not found and all(int(name) < len(ids) for name in unknown):
        announce(f"{place}: none of its {len(unknown):,} entries is an id of {data}; they are read as row numbers.")
        return {name: int(name) for name in unknown}
    if unknown and not (partial and found):
        count = len(ids)
        shown = ", ".join(map(repr, unknown[:_NAMED]))
        shown += f" and {len(unknown) - _NAMED:,} more" if len(unknown) > _NAMED else ""
        near = dict.fromkeys(close for name in unknown[:_NAMED] for close in difflib.get_close_matches(name, ids, n=1))
        shown += f". Did you mean {', '.join(map(repr, near))}?" if near else "."
        raise DataError(
            f"{place} names {len(unknown):,} rows that {data} does not have: {shown} Give ids of its {count:,} rows "
            f"(such as {ids[0]!r}), or nothing but row numbers from 0 to {len(ids) - 1}."
        )
    return found


def rows_listed(source: str | Path, ids: Sequence[str], data: str = "the data") -> list[int]:
    """Return the rows that a list names, ascending; the rest is as for `read_row_list` and `rows_named`."""
    names = [entry.name for entry in read_row_list(source)]
    return sorted(set(rows_named(names, ids, place=str(source), data=data).values()))


def _list_in(path: Path) -> Path:
    """Return the file of a folder that holds a list."""
    if not path.is_dir():
        return path
    held = [path / name for name in _FOLDERS if (path / name).is_file()]
    if held:
        return held[0]
    if (path / "scores.parquet").is_file():
        raise DataError(
            f"{path} is a run, which ranks rows for each query and names no list of rows. Take the list from "
            f"its report (vestige report {path}; Row list, CSV or JSONL), or write the ids into a file, one a line."
        )
    raise DataError(f"{path} is a folder without a list of rows. Expected {_FORMS}.")


def _read_values(path: Path) -> Iterable[Any]:
    """Return what a list holds, one value a row: a mapping of columns, or an id."""
    if path.suffix == ".parquet":
        return parquet.read_table(path, memory_map=False).to_pylist()
    text = path.read_text(encoding="utf-8-sig")
    start = text.lstrip()[:1]
    if start == "[" and path.suffix != ".jsonl":
        return parse_json(text)
    if start in ("{", "[") or path.suffix in (".jsonl", ".ndjson"):
        return [parse_json(line) for line in text.split("\n") if line.strip()]
    head = text.lstrip().partition("\n")[0]
    for mark in (",", "\t", ";"):
        names = [name.strip().strip('"') for name in head.split(mark)]
        if set(COLUMNS) & set(names) and (len(names) > 1 or path.suffix in (".csv", ".tsv")):
            return csv.DictReader(StringIO(text, newline=""), delimiter=mark)
    return [line.strip() for line in text.split("\n") if line.strip()]


def _entry(record: Any, place: int, path: Path) -> RowEntry:
    if isinstance(record, str | int) and not isinstance(record, bool):
        return RowEntry(str(record))
    cells: Mapping[str, Any] = record if isinstance(record, Mapping) else {}
    column = next((name for name in COLUMNS if cells.get(name) not in (None, "")), None)
    if column is None:
        raise DataError(f"{path}, entry {place}: names no row. Expected {_FORMS}.")
    return RowEntry(str(cells[column]), {name: cell for name, cell in cells.items() if name != column})


def _is_meant(flagged: Any) -> bool:
    return str(flagged).strip().lower() not in ("false", "0", "no", "none", "")


def token_groups(data: TokenizedData, column: str | None = None) -> Int[np.ndarray, "example"]:
    """Return the group of each row: rows with equal tokens and targets share one, or with `column` equal values of it.

    Groups are numbered by their first rows, so without copies row `i` is group `i`.

    Raises:
        DataError: A row has no value of the column.
    """
    if column is not None:
        return _number_groups(_values(data.examples, column))
    return _number_groups(hash_example("", ids, mask) for ids, mask in zip(data.input_ids, data.targets, strict=True))


def text_groups(examples: Iterable[Example]) -> Int[np.ndarray, "example"]:
    """Return the group of each example, as `token_groups` does, where there is no tokenizer: equal contents share one.

    The content is the text, the prompt and completion or the turns, and columns of lists and mappings (token ids,
    masks, tools); an id, a source, a label and other plain columns are not.
    """
    return _number_groups(map(_content, examples))


def describe_copies(groups: Int[np.ndarray, "example"], column: str | None = None) -> str | None:
    """Return how many rows belong to the same texts, in a sentence; None where every row is a group of its own."""
    count = int(groups.max(initial=-1)) + 1
    if count == len(groups):
        return None
    if column is not None:
        return f"{len(groups):,} rows have {count:,} values of {column!r}: rows of one value stay together."
    copies = len(groups) - count
    return f"{copies:,} of {len(groups):,} rows are copies of others: {count:,} distinct texts, each counted once."


def _number_groups(keys: Iterable[bytes]) -> Int[np.ndarray, "example"]:
    """Assign numbers to equal keys, in the order of their first rows; 16 bytes a row are held."""
    digests = bytearray()
    for key in keys:
        digests += hashlib.blake2b(key, digest_size=16).digest()
    _, firsts, groups = np.unique(np.frombuffer(bytes(digests), "V16"), return_index=True, return_inverse=True)
    numbers = np.empty(len(firsts), dtype=np.int64)
    numbers[np.argsort(firsts)] = np.arange(len(firsts))
    return numbers[groups]


def _content(example: Example) -> bytes:
    more = [name for name, cell in example.extra.items() if isinstance(cell, list | tuple | dict | np.ndarray)]
    kept = ("text", "prompt", "completion", "messages", *more)
    parts = {name: cell for name, cell in example.columns.items() if name in kept}
    return json.dumps(parts, sort_keys=True, default=as_plain).encode()


def _values(examples: Sequence[Example], column: str) -> Iterable[bytes]:
    for row, example in enumerate(examples):
        value = getattr(example, column) if column in ("id", "source", "label") else example.extra.get(column)
        if value is None:
            raise DataError(
                f"--group {column}: row {row} (id {example.id!r}) has no such column. Give every row one, or leave "
                "--group out to keep copies of one text together."
            )
        yield str(value).encode()
