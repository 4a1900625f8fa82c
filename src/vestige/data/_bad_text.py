"""Halves of surrogate pairs, which scrapes and cut emoji leave behind: no text that can be encoded holds one."""

import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from vestige.data._origin import Record, place, shown
from vestige.errors import DataError

OnBadText = Literal["refuse", "replace"]

_HALF = re.compile("[\ud800-\udfff]")
REPLACEMENT = "\ufffd"


class Repaired(NamedTuple):
    """A value whose texts can be encoded, and where halves of surrogate pairs were replaced."""

    value: Any
    fields: list[str]
    """The field of each half."""


def repair(value: Any, field: str = "") -> Repaired:
    """Replace every half of a surrogate pair in the value's texts and names of columns with U+FFFD."""
    if isinstance(value, str):
        halves = [] if value.isascii() else _HALF.findall(value)
        return Repaired(_HALF.sub(REPLACEMENT, value), [field] * len(halves)) if halves else Repaired(value, [])
    if isinstance(value, Mapping):
        names = {name: repair(name, str(name)) for name in value}
        cells = {name: repair(cell, f"{field}.{name}" if field else str(name)) for name, cell in value.items()}
        fields = [each for part in (*names.values(), *cells.values()) for each in part.fields]
        if not fields:
            return _as_is(value)
        return Repaired({names[name].value: cell.value for name, cell in cells.items()}, fields)
    if isinstance(value, list | tuple) and value and not isinstance(value[0], int | float):
        parts = [repair(item, f"{field}[{number}]") for number, item in enumerate(value)]
        fields = [each for part in parts for each in part.fields]
        return Repaired([part.value for part in parts], fields) if fields else _as_is(value)
    return _as_is(value)


def _as_is(value: Any) -> Repaired:
    return Repaired(value, [])


class Checked(NamedTuple):
    """A record whose texts can be encoded, and how many halves of surrogate pairs were replaced in it."""

    record: Record
    replaced: int


def check_text(name: str, row: int, record: Record, on_bad_text: OnBadText) -> Checked:
    """Return the record of the source called `name`, checked or repaired as `--on-bad-text` requires.

    Raises:
        DataError: It holds half of a surrogate pair, which is refused.
    """
    try:
        value, fields = repair(record.value)
    except RecursionError:
        raise DataError(f"{place(name, row, record)}: its values are nested too deeply to be read.") from None
    if fields and on_bad_text == "refuse":
        where = f"`{fields[0]}`".encode("ascii", "backslashreplace").decode() if fields[0] else "the text"
        raise DataError(
            f"{place(name, row, record)}: {where} holds half of a surrogate pair (such as \\ud83d, an emoji that was "
            f"cut), which is no character: {shown(value if isinstance(value, str) else value.get(fields[0], value))}. "
            'Correct it, or type --on-bad-text replace (on_bad_text="replace") to replace it with U+FFFD.'
        )
    return Checked(record._replace(value=value), len(fields)) if fields else Checked(record, 0)
