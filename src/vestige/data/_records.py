"""Records as readers return them, chosen and checked, and the words that name them in an error."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, Literal, NamedTuple

from vestige.errors import DataError
from vestige.parsing import parse_json
from vestige.progress import announce

OnBadText = Literal["refuse", "replace"]

_HALF = re.compile("[\ud800-\udfff]")
_REPLACEMENT = "\ufffd"
_SHOWN = 10
"""Values of a column that an error lists."""


class Record(NamedTuple):
    """One record as the source holds it, before it is known which columns matter."""

    value: Any
    """A mapping of columns, or a bare string; with `unparsed`, the text of a line of JSON."""
    line: int | None = None
    """Line of the file where the record starts, counted from 1, for formats that have lines."""
    unparsed: str | None = None
    """The file, where `value` is a line that `parse_record` has yet to read: so that other processes may."""
    file: str | None = None
    """The file's name, where a source has several."""
    row: int = 0
    """Number of the record among those that are used, counted from 0."""
    number: int | None = None
    """Number in its source, counted from 0, where a column decides which records are used."""

    @property
    def source_row(self) -> int:
        """The number in its source, which stands for an id that is missing."""
        return self.row if self.number is None else self.number


class Source(NamedTuple):
    """Records in their order, and the name of their origin."""

    name: str
    records: Iterable[Record]
    identity: str | None = None
    """Changes whenever the content may have changed; None where this is unknown, as of a list in memory."""


def parse_record(record: Record) -> Record:
    """Return the record with its columns.

    Raises:
        DataError: Its line is not JSON.
    """
    if record.unparsed is None:
        return record
    try:
        return record._replace(value=parse_json(record.value), unparsed=None)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{record.unparsed}, line {record.line}: not valid JSON: {error.msg} at column {error.colno}. The line is "
            f'{quote(record.value.strip())}; each line must be one object such as {{"text": "..."}}.'
        ) from error


def place(name: str, record: Record) -> str:
    """Return the position of a record, for an error message: `train.jsonl, row 3 (line 5)`; rows count from 0."""
    known = (record.file, None if record.line is None else f"line {record.line}")
    inside = ", ".join(part for part in known if part)
    return f"{name}, row {record.source_row}" + (f" ({inside})" if inside else "")


def number_records(source: Source, limit: int | None, where: Mapping[str, Any] | None = None) -> Iterator[Record]:
    """Yield at most `limit` records that have the values `where` of columns; leaving some out is announced."""
    if limit is not None and limit < 1:
        raise DataError(f"limit={limit}: give a whole number of rows above 0, or leave it out.")
    records = iter(_choose(source, where) if where else source.records)
    for row, record in enumerate(islice(records, limit)):
        yield record._replace(row=row)
    if limit is not None and next(records, None) is not None:
        announce(f"{source.name}: only the first {limit:,} rows are used (limit={limit}); the rest is left out.")


def _choose(source: Source, where: Mapping[str, Any]) -> Iterator[Record]:
    """Yield the records that have the values, and announce how many there were."""
    total = chosen = 0
    others: dict[str, dict[str, None]] = {column: {} for column in where}
    for total, unread in enumerate(source.records, start=1):
        value = parse_record(unread).value
        cells = value if isinstance(value, Mapping) else {}
        if all(_is(cells.get(column), wanted) for column, wanted in where.items()):
            chosen += 1
            yield unread._replace(number=total - 1)
        for column in where:
            if column in cells and len(others[column]) < _SHOWN:
                others[column][quote(cells[column])] = None
    words = ", ".join(f"{column}={wanted}" for column, wanted in where.items())
    if total and not chosen:
        found = "; ".join(
            f"`{column}` is {', '.join(values)}" if values else f"no row has a column `{column}`"
            for column, values in others.items()
        )
        raise DataError(f"{source.name}: none of its {total:,} rows has {words} ({found}). Give other values.")
    announce(f"{source.name}: {chosen:,} of {total:,} rows have {words}; the others are left out.")


def _is(cell: Any, wanted: Any) -> bool:
    """Return whether a cell has the value; what was typed as a text may mean a number, true or false."""
    if cell is None or isinstance(cell, str) or not isinstance(wanted, str):
        return bool(cell == wanted)
    try:
        return bool(cell == parse_json(wanted))
    except ValueError:
        return False


def quote(value: object, width: int = 60) -> str:
    """Cut a value to `width` characters, as Python would write it."""
    text = repr(value)
    return text if len(text) <= width else text[: width - 3] + "..."


def repair(value: Any, field: str = "") -> tuple[Any, list[str]]:
    """Replace every half of a surrogate pair, which no encoding knows, in texts and names of columns with U+FFFD.

    Returns:
        The value, and the field of each half that was replaced.
    """
    if isinstance(value, str):
        halves = [] if value.isascii() else _HALF.findall(value)
        return (_HALF.sub(_REPLACEMENT, value) if halves else value), [field] * len(halves)
    if isinstance(value, Mapping):
        names = {name: repair(name, str(name)) for name in value}
        cells = {name: repair(cell, f"{field}.{name}" if field else str(name)) for name, cell in value.items()}
        fields = [each for _, found in (*names.values(), *cells.values()) for each in found]
        return ({names[name][0]: cell for name, (cell, _) in cells.items()} if fields else value), fields
    if isinstance(value, list | tuple) and value and not isinstance(value[0], int | float):
        parts = [repair(item, f"{field}[{number}]") for number, item in enumerate(value)]
        fields = [each for _, found in parts for each in found]
        return ([part for part, _ in parts] if fields else value), fields
    return value, []


def check_text(name: str, record: Record, on_bad_text: OnBadText) -> tuple[Record, int]:
    """Check, or repair, the texts of a record of the source called `name`, as `--on-bad-text` requires.

    Returns:
        The record, and how many halves of surrogate pairs were replaced in it.

    Raises:
        DataError: It holds half of a surrogate pair, which is refused.
    """
    try:
        value, fields = repair(record.value)
    except RecursionError:
        raise DataError(f"{place(name, record)}: its values are nested too deeply to be read.") from None
    if fields and on_bad_text == "refuse":
        where = f"`{fields[0]}`".encode("ascii", "backslashreplace").decode() if fields[0] else "the text"
        raise DataError(
            f"{place(name, record)}: {where} holds half of a surrogate pair (such as \\ud83d, an emoji that was "
            f"cut), which is no character: {quote(value if isinstance(value, str) else value.get(fields[0], value))}. "
            'Correct it, or type --on-bad-text replace (on_bad_text="replace") to replace it with U+FFFD.'
        )
    return record._replace(value=value), len(fields)


def as_plain(value: Any) -> Any:
    """Return a value that JSON has no form for in one that it has."""
    return value.tolist() if hasattr(value, "tolist") else str(value)
