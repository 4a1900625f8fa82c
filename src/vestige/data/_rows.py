"""Parsing of one record into one example: the accepted formats, and the error when a record has none of them."""

import difflib
import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from vestige.data._encode import IDS, SUSPECT, is_used, read_columns
from vestige.data._records import Record, quote
from vestige.data._turns import MEDIA, read_json, read_turns, refuse_media
from vestige.data._types import ASSISTANT, Example, Message
from vestige.errors import DataError

SYSTEM = ("system", "system_prompt", "system_message")
HISTORY = "history"
TOOLS = ("tools", "functions", "available_tools")
DOCUMENTS, TEMPLATE_SETTINGS = "documents", "chat_template_kwargs"
_TEMPLATE = (*TOOLS, DOCUMENTS, TEMPLATE_SETTINGS)
_DESIRABLE = ("label", "kto_tag", "kto_label")
_PREFERENCE = ("chosen", "rejected", "chosen_response", "rejected_response", "rejected_messages", "rejected_responses")
_RULES = re.compile(r"(train|learn|mask)_(on_)?(prompt|input|history|last|all|every|assistant|completion|response)\w*")
"""Settings of a training that a row carries."""
_RESERVED = ("messages", "conversation", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize")


def refuse_columns(columns: Mapping[str, Any], example: Example, place: str) -> None:
    """Raise where a column of training data marks the row as not to be learned as it stands, or is no text."""
    if "input_ids" in example.extra or example.text is not None:
        return
    for name in _PREFERENCE:
        if isinstance(columns.get(name), str | list | Mapping) and columns[name]:
            raise DataError(
                f"{place}: `{name}` is of a preference between answers, and Vestige reads answers that are learned. "
                f"Write the chosen answer as `completion` or into `messages`, and drop `{name}`."
            )
    for name in _DESIRABLE:
        if columns.get(name) is False:
            raise DataError(
                f"{place}: `{name}` is false, which marks an answer to be avoided (KTO), and Vestige would take it for "
                f"one that is learned. Keep only rows whose `{name}` is true; if it marks something else, write it as "
                "a text."
            )
    for name, cell in columns.items():
        of_each_turn = example.messages and isinstance(cell, list) and len(cell) == len(example.messages)
        if _RULES.fullmatch(name) or (of_each_turn and name not in _TEMPLATE and SUSPECT.search(name.lower())):
            raise DataError(
                f"{place}: `{name}` may decide which parts of the row are learned, and Vestige does not read it. Give "
                "each turn a `weight` of 0 or 1 instead, or drop it if it changes nothing."
            )
    refuse_media([name for name in MEDIA if columns.get(name)], "column", place)


def turns_before(example: Example) -> tuple[Message, ...]:
    """Return the turns that `system` and `history` put before those of the row itself."""
    found = [name for name in SYSTEM if example.extra.get(name)]
    place = example.position
    turns: list[Message] = []
    for name in found:
        text = example.extra[name]
        if not isinstance(text, str) or text != example.extra[found[0]]:
            raise DataError(f"{place}: `{name}` is {quote(text)}; expected one text for the system's turn.")
        turns = [Message("system", text)]
    if turns and example.messages and example.messages[0].role == "system":
        if example.messages[0].content != turns[0].content:
            raise DataError(
                f"{place}: `{found[0]}` and the system's turn of the conversation differ. Drop one of them."
            )
        turns = []
    for number, pair in enumerate(_history(example, place)):
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise DataError(
                f"{place}: `{HISTORY}`[{number}] is {quote(pair)}; expected a list of a question and its answer."
            )
        turns += [Message("user", pair[0]), Message(ASSISTANT, pair[1])]
    return tuple(turns)


def _history(example: Example, place: str) -> list[Any]:
    given = example.extra.get(HISTORY) if not example.messages else None
    given = read_json(given, HISTORY, place) if isinstance(given, str) and given else given
    if given and not isinstance(given, list):
        raise DataError(f"{place}: `{HISTORY}` is {quote(given)}; expected a list of [question, answer].")
    return given or []


def template_variables(example: Example) -> dict[str, Any]:
    """Return what the columns of a row pass to the chat template: `tools`, `documents` and its own settings."""
    place, found = example.position, dict[str, Any]()
    for name in _TEMPLATE:
        cell: Any = example.extra.get(name)
        cell = read_json(cell, name, place) if isinstance(cell, str) and cell else cell
        if not cell:
            continue
        if not isinstance(cell, Mapping if name == TEMPLATE_SETTINGS else list):
            kind = "an object" if name == TEMPLATE_SETTINGS else "a list"
            raise DataError(f"{place}: `{name}` is {quote(cell)}; expected {kind}, also as JSON text.")
        if isinstance(cell, Mapping):
            if taken := [key for key in cell if key in _RESERVED or key.startswith("return_")]:
                raise DataError(
                    f"{place}: `{TEMPLATE_SETTINGS}` holds `{taken[0]}`, which is no variable of a chat template but "
                    "decides how it is called. Drop it."
                )
            found |= cell
        elif "tools" in found and name in TOOLS:
            raise DataError(f"{place}: `{name}` beside other tools. Put all tools into `tools`.")
        else:
            found["tools" if name in TOOLS else name] = cell
    return found


def refuse_without_template(example: Example, name: str) -> None:
    """Raise where a prompt that no chat template writes has columns that only a chat template can write."""
    given = [column for column in (*SYSTEM, HISTORY, *TOOLS, TEMPLATE_SETTINGS) if example.extra.get(column)]
    if given and example.text is None:
        raise DataError(
            f"{name}, {example.position}: `{given[0]}` belongs to a conversation, and the row is read as plain text. "
            "Type --chat (chat=True) to write it with the chat template, put it into the prompt, or drop the column."
        )


def conversation_columns(example: Example) -> dict[str, Any]:
    """Return the columns that a chat template is given, or that put turns before those of the row."""
    return {name: example.extra[name] for name in (*SYSTEM, HISTORY, *_TEMPLATE) if name in example.extra}


def find_unused_columns(example: Example) -> set[str]:
    """Return the columns that change neither the text of the example nor its loss."""
    if IDS in example.extra:
        return {name for name, cell in example.extra.items() if not is_used(name, cell)}
    if example.text is not None:
        return set(example.extra)
    used = (*SYSTEM, *_TEMPLATE, *(() if example.messages else (HISTORY,)))
    return set(example.extra).difference(used)


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


def example_from_record(record: Record, place: str, *, is_query: bool, learned: bool) -> Example:
    """Return the example that a record describes; `place` names the record's position in errors.

    A record that fits several formats is read as the most structured one: turns, then pairs, then text.
    `None` counts as absent, and an empty string only where another format has content. A query may be a
    prompt alone. What is to be `learned` may not be an answer that training was to avoid.
    """
    value = {"prompt" if is_query else "text": record.value} if isinstance(record.value, str) else record.value
    if not isinstance(value, Mapping):
        raise DataError(
            f'{place}: expected an object with named columns such as {{"text": "..."}}, got {quote(value)}.'
        )
    columns = {str(name): cell for name, cell in value.items() if cell is not None}
    found = _parse(columns, place, is_query)
    if found is None:
        raise DataError(_no_format(columns, [str(name) for name in value if value[name] is None], place, is_query))
    fields, used = found
    carried: dict[str, Any] = {name: _carry(columns.get(name)) for name in ("source", "label")}
    extra = {name: cell for name, cell in columns.items() if name not in (*used, *CARRIED)}
    if "input_ids" in extra:
        extra |= read_columns(columns, place)
    example = Example(id=_identity(columns, record, place), row=record.row, **fields, **carried, extra=extra)
    if learned:
        refuse_columns(columns, example, place)
    return example


def _parse(columns: dict[str, Any], place: str, is_query: bool) -> tuple[dict[str, Any], tuple[str | None, ...]] | None:
    """Return fields of `Example` and the columns that they are made of, by the first format that fits.

    One whose columns have content comes before one with empty strings.
    """
    filled = {name for name, cell in columns.items() if not (isinstance(cell, str) and cell == "")}
    for present in (filled, set(columns)):
        for name in TURN_COLUMNS:
            if name in present:
                return {"messages": read_turns(columns[name], name, place)}, (name,)
        for pair in PAIR_FORMATS:
            if pair.prompt in present and pair.completion in present:
                return _read_pair(pair, columns, place, is_query), pair[:3]
        if "text" in present:
            return {"text": _text(columns, "text", place)}, ("text",)
        if "input_ids" in present:
            return {}, ()
    alone = [pair for pair in PAIR_FORMATS if pair.prompt in columns] if is_query else []
    return (_read_pair(alone[0], columns, place, is_query), alone[0][:3]) if alone else None


def _read_pair(pair: PairFormat, columns: dict[str, Any], place: str, is_query: bool) -> dict[str, Any]:
    """Return the prompt, ending in the format's separator, and the completion if there is one."""
    prompt = _text(columns, pair.prompt, place)
    if pair.context is not None and pair.context in columns:
        context = _text(columns, pair.context, place)
        prompt = f"{prompt}\n\n{context}" if context else prompt
    prompt = prompt if prompt.endswith("\n") else prompt + pair.separator
    completion = _text(columns, pair.completion, place) if pair.completion in columns else None
    # An empty cell of a table of queries: the answer is still to come.
    return {"prompt": prompt, "completion": None if is_query and not completion else completion}


def _text(columns: dict[str, Any], name: str, place: str) -> str:
    cell = columns[name]
    if isinstance(cell, str):
        return cell
    if isinstance(cell, list) and cell and isinstance(cell[0], dict):
        advice = "Put the turns of a conversation into a column `messages`."
    else:
        advice = "Write it as a string."
    raise DataError(
        f"{place}: `{name}` must be a text, but it is of type {type(cell).__name__}: {quote(cell)}. {advice}"
    )


def _identity(columns: dict[str, Any], record: Record, place: str) -> str:
    cell = columns.get("id")
    if cell is None or cell == "":
        return str(record.source_row)
    if isinstance(cell, bool) or not isinstance(cell, str | int | float):
        raise DataError(f"{place}: `id` must be a text or a number, got {quote(cell)}.")
    return str(cell)


def _carry(cell: Any) -> str | None:
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
    words = ["text", *TURN_COLUMNS, *(word for pair in PAIR_FORMATS for word in pair[:2])]
    for name in names:
        if close := difflib.get_close_matches(name.lower(), words, n=1, cutoff=0.75):
            return f"{message} Rename `{name}` to `{close[0]}`?"
    return f"{message} Rename the column that holds the text to `text`."
