"""Columns beside the text: those that change what a model read or learned, and how each is treated."""

import re
from collections.abc import Mapping
from typing import Any

from vestige.data._origin import shown
from vestige.data._token_rows import IDS, SUSPECT, is_used
from vestige.data._turns import read_json
from vestige.data._types import ASSISTANT, Example, Message
from vestige.errors import DataError

SYSTEM = ("system", "system_prompt", "system_message")
HISTORY = "history"
TOOLS = ("tools", "functions", "available_tools")
DOCUMENTS, TEMPLATE_SETTINGS = "documents", "chat_template_kwargs"
_TEMPLATE = (*TOOLS, DOCUMENTS, TEMPLATE_SETTINGS)
_MEDIA = ("images", "image", "videos", "video", "audios", "audio")
_DESIRABLE = ("label", "kto_tag", "kto_label")
_PREFERENCE = ("chosen", "rejected", "chosen_response", "rejected_response", "rejected_messages", "rejected_responses")
_RULES = re.compile(r"(train|learn|mask)_(on_)?(prompt|input|history|last|all|every|assistant|completion|response)\w*")
"""Settings of a training that a row carries."""
_RESERVED = ("messages", "conversation", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize")


def refuse_columns(columns: Mapping[str, Any], example: Example, place: str) -> None:
    """Raise where a column of training data marks the row as not to be learned as it stands, or is no text.

    Raises:
        DataError: The row is half of a preference, is one to be avoided, or has pictures or sound.
    """
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
    for name in _MEDIA:
        if columns.get(name):
            raise DataError(
                f"{place}: `{name}` is no text, and Vestige reads text alone. Leave the row out, or drop the column to "
                "have the text without it."
            )


def turns_before(example: Example) -> tuple[Message, ...]:
    """Return the turns that `system` and `history` put before those of the row itself.

    Raises:
        DataError: One of the columns is not what its name means, or the row has a system's turn of its own.
    """
    found = [name for name in SYSTEM if example.extra.get(name)]
    place = f"row {example.row} (id {example.id!r})"
    turns: list[Message] = []
    for name in found:
        text = example.extra[name]
        if not isinstance(text, str) or text != example.extra[found[0]]:
            raise DataError(f"{place}: `{name}` is {shown(text)}; expected one text for the system's turn.")
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
                f"{place}: `{HISTORY}`[{number}] is {shown(pair)}; expected a list of a question and its answer."
            )
        turns += [Message("user", pair[0]), Message(ASSISTANT, pair[1])]
    return tuple(turns)


def _history(example: Example, place: str) -> list[Any]:
    given = example.extra.get(HISTORY) if not example.messages else None
    given = read_json(given, HISTORY, place) if isinstance(given, str) and given else given
    if given and not isinstance(given, list):
        raise DataError(f"{place}: `{HISTORY}` is {shown(given)}; expected a list of [question, answer].")
    return given or []


def template_variables(example: Example) -> dict[str, Any]:
    """Return what the columns of a row pass to the chat template: `tools`, `documents` and its own settings.

    Raises:
        DataError: One of the columns is not what its name means.
    """
    place, found = f"row {example.row} (id {example.id!r})", dict[str, Any]()
    for name in _TEMPLATE:
        cell: Any = example.extra.get(name)
        cell = read_json(cell, name, place) if isinstance(cell, str) and cell else cell
        if not cell:
            continue
        if not isinstance(cell, Mapping if name == TEMPLATE_SETTINGS else list):
            kind = "an object" if name == TEMPLATE_SETTINGS else "a list"
            raise DataError(f"{place}: `{name}` is {shown(cell)}; expected {kind}, also as JSON text.")
        if isinstance(cell, Mapping):
            _refuse_reserved(cell, place)
            found |= cell
        elif "tools" in found and name in TOOLS:
            raise DataError(f"{place}: `{name}` beside other tools. Put all tools into `tools`.")
        else:
            found["tools" if name in TOOLS else name] = cell
    return found


def _refuse_reserved(settings: Mapping[str, Any], place: str) -> None:
    if taken := [key for key in settings if key in _RESERVED or key.startswith("return_")]:
        raise DataError(
            f"{place}: `{TEMPLATE_SETTINGS}` holds `{taken[0]}`, which is no variable of a chat template but decides "
            "how it is called. Drop it."
        )


def refuse_without_template(example: Example, name: str) -> None:
    """Raise where a prompt that no chat template writes has columns that only a chat template can write.

    Raises:
        DataError: It has; the message names the column.
    """
    given = [column for column in (*SYSTEM, HISTORY, *TOOLS, TEMPLATE_SETTINGS) if example.extra.get(column)]
    if given and example.text is None:
        raise DataError(
            f"{name}, row {example.row} (id {example.id!r}): `{given[0]}` belongs to a conversation, and the row is "
            "read as plain text. Type --chat (chat=True) to write it with the chat template, put it into the prompt, "
            "or drop the column."
        )


def conversation_columns(example: Example) -> dict[str, Any]:
    """Return the columns that a chat template is given, or that put turns before those of the row."""
    return {name: example.extra[name] for name in (*SYSTEM, HISTORY, *_TEMPLATE) if name in example.extra}


def unused_columns(example: Example) -> set[str]:
    """Return the columns that change neither the text of the example nor its loss."""
    if IDS in example.extra:
        return {name for name, cell in example.extra.items() if not is_used(name, cell)}
    if example.text is not None:
        return set(example.extra)
    used = (*SYSTEM, *_TEMPLATE, *(() if example.messages else (HISTORY,)))
    return set(example.extra) - set(used)
