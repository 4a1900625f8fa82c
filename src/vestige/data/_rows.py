"""Parsing of one record into one example: the accepted formats, and the error when a record has none of them."""

import difflib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from vestige.data._columns import refuse_columns
from vestige.data._origin import shown
from vestige.data._token_rows import read_columns
from vestige.data._turns import read_turns
from vestige.data._types import Example
from vestige.errors import DataError


class PairFormat(NamedTuple):
    """Names of the columns that hold a prompt and its completion."""

    prompt: str
    completion: str
    context: str | None = None
    """Optional column that follows the prompt after an empty line."""
    separator: str = ""
    """What stands between prompt and completion; only `prompt`/`completion` are joined as they are."""


PAIR_FORMATS = (
    PairFormat("prompt", "completion"),
    PairFormat("instruction", "output", context="input", separator="\n"),
    PairFormat("question", "answer", separator="\n"),
)
TURN_COLUMNS = ("messages", "conversations")
CARRIED = ("id", "source", "label")
EXPECTED = (
    "`text`; `prompt` and `completion`; `instruction` (and `input`) and `output`; `question` and `answer`; "
    "`messages`; `input_ids`"
)


class Parsed(NamedTuple):
    """The result of a format for a record: fields of `Example`, and the columns that it used up."""

    fields: dict[str, Any]
    used: tuple[str, ...]


def example_from_record(value: Any, row: int, place: str, *, is_query: bool, learned: bool) -> Example:
    """Return the example that a record describes; `place` names the record's position in errors.

    A record that fits several formats is read as the most structured one: turns, then pairs, then text.
    `None` counts as absent, and an empty string only where another format has content. A query may be a
    prompt alone. What is to be `learned` may not be an answer that training was to avoid.

    Raises:
        DataError: No format fits, a column holds the wrong type, or the row is not to be learned.
    """
    if isinstance(value, str):
        value = {"prompt" if is_query else "text": value}
    if not isinstance(value, Mapping):
        raise DataError(
            f'{place}: expected an object with named columns such as {{"text": "..."}}, got {shown(value)}.'
        )
    columns = {str(name): cell for name, cell in value.items() if cell is not None}
    parsed = _parse(columns, place, is_query)
    if parsed is None:
        raise DataError(_no_format(columns, [str(name) for name in value if value[name] is None], place, is_query))
    carried: dict[str, Any] = {name: _carried(columns.get(name)) for name in ("source", "label")}
    extra = {name: cell for name, cell in columns.items() if name not in (*parsed.used, *CARRIED)}
    if "input_ids" in extra:
        extra |= read_columns(columns, place)
    example = Example(id=_identity(columns, row, place), row=row, **parsed.fields, **carried, extra=extra)
    if learned:
        refuse_columns(columns, example, place)
    return example


def _parse(columns: dict[str, Any], place: str, is_query: bool) -> Parsed | None:
    """Return the first format that fits, preferring one whose columns have content over one with empty strings."""
    filled = {name for name, cell in columns.items() if not (isinstance(cell, str) and cell == "")}
    for present in (filled, set(columns)):
        for name in TURN_COLUMNS:
            if name in present:
                return Parsed({"messages": read_turns(columns[name], name, place)}, (name,))
        for pair in PAIR_FORMATS:
            if pair.prompt in present and pair.completion in present:
                return _pair(pair, columns, place, is_query)
        if "text" in present:
            return Parsed({"text": _text(columns, "text", place)}, ("text",))
        if "input_ids" in present:
            return Parsed({}, ())
    return _prompt_alone(columns, place) if is_query else None


def _pair(pair: PairFormat, columns: dict[str, Any], place: str, is_query: bool) -> Parsed:
    prompt, used = _prompt(pair, columns, place)
    completion: str | None = _text(columns, pair.completion, place)
    if is_query and not completion:
        completion = None  # an empty cell of a table: the answer is still to come
    return Parsed({"prompt": prompt, "completion": completion}, (*used, pair.completion))


def _prompt_alone(columns: dict[str, Any], place: str) -> Parsed | None:
    for pair in PAIR_FORMATS:
        if pair.prompt in columns:
            prompt, used = _prompt(pair, columns, place)
            return Parsed({"prompt": prompt}, used)
    return None


def _prompt(pair: PairFormat, columns: dict[str, Any], place: str) -> tuple[str, tuple[str, ...]]:
    """Return the prompt's text, ending in the format's separator, and the columns that it is made of."""
    prompt = _text(columns, pair.prompt, place)
    used: tuple[str, ...] = (pair.prompt,)
    if pair.context is not None and pair.context in columns:
        context = _text(columns, pair.context, place)
        prompt = f"{prompt}\n\n{context}" if context else prompt
        used = (*used, pair.context)
    return (prompt if prompt.endswith("\n") else prompt + pair.separator), used


def _text(columns: dict[str, Any], name: str, place: str) -> str:
    cell = columns[name]
    if isinstance(cell, str):
        return cell
    if isinstance(cell, list) and cell and isinstance(cell[0], dict):
        advice = "Put the turns of a conversation into a column `messages`."
    else:
        advice = "Write it as a string."
    raise DataError(
        f"{place}: `{name}` must be a text, but it is of type {type(cell).__name__}: {shown(cell)}. {advice}"
    )


def _identity(columns: dict[str, Any], row: int, place: str) -> str:
    cell = columns.get("id")
    if cell is None or cell == "":
        return str(row)
    if isinstance(cell, bool) or not isinstance(cell, str | int | float):
        raise DataError(f"{place}: `id` must be a text or a number, got {shown(cell)}.")
    return str(cell)


def _carried(cell: Any) -> str | None:
    """Return a source or label as text; an empty one counts as absent, a structured one is written as JSON."""
    if cell is None or cell == "":
        return None
    return json.dumps(cell, default=str) if isinstance(cell, list | dict) else str(cell)


def _no_format(columns: dict[str, Any], nulls: list[str], place: str, is_query: bool) -> str:
    names = [name for name in columns if name not in CARRIED]
    listed = ", ".join(f"`{name}`" for name in columns) or "none"
    if nulls:
        listed += f" ({', '.join(f'`{name}`' for name in nulls)} without a value)"
    message = f"{place}: its columns are {listed}; expected {EXPECTED}" + (", or `prompt` alone." if is_query else ".")
    for pair in PAIR_FORMATS:
        for has, lacks in ((pair.prompt, pair.completion), (pair.completion, pair.prompt)):
            if has in columns and lacks not in columns:
                return f"{message} It has `{has}` but no `{lacks}`."
    words = [
        "text",
        *TURN_COLUMNS,
        *(word for pair in PAIR_FORMATS for word in (pair.prompt, pair.completion)),
    ]
    for name in names:
        close = difflib.get_close_matches(name.lower(), words, n=1, cutoff=0.75)
        if close:
            return f"{message} Rename `{name}` to `{close[0]}`?"
    return f"{message} Rename the column that holds the text to `text`."
