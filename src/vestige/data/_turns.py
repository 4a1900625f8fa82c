"""The turns of a conversation: every spelling that data come in, and which of them the model is to learn."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from vestige.data._records import quote, repair
from vestige.data._types import ASSISTANT, Message
from vestige.errors import DataError
from vestige.parsing import parse_json

ROLES = {"human": "user"} | dict.fromkeys(("gpt", "chatgpt", "ai", "bot", "model"), ASSISTANT)
"""Other names of roles, in lower case; `user`, `assistant` and `system` are recognised in any case."""
_KNOWN_ROLES = ("user", ASSISTANT, "system", "tool", "developer", "function")

WEIGHT_KEY = "weight"
TRAIN_KEYS = ("train", "training", "trainable", "learn", "loss", "loss_mask", "loss_weight", "loss_scale")
"""Keys that are true where a turn is learned; a `weight` does so for assistant's turns alone."""
MASK_KEYS = ("mask", "masked", "ignore", "ignore_loss")
"""Keys that are true where a turn is not learned."""
_TURN_DETAILS = ("train_detail", "training_detail", "token_weights", "weights")
FLAGS = (WEIGHT_KEY, *TRAIN_KEYS, *MASK_KEYS)

_TEXT_PARTS = (None, "text", "input_text", "output_text")
_PART_KEYS = ("type", "text", "cache_control", "annotations")
_CALLS = ("tool_calls", "function_call")
MEDIA = ("images", "image", "videos", "video", "audios", "audio")


def read_turns(cell: Any, name: str, place: str) -> tuple[Message, ...]:
    """Read the turns of a conversation: role and content, or from and value; also as JSON text or as columns."""
    if isinstance(cell, str):
        cell = read_json(cell, name, place)
    if isinstance(cell, Mapping) and cell and all(isinstance(column, list) for column in cell.values()):
        lengths = {str(key): len(column) for key, column in cell.items()}
        if len(set(lengths.values())) > 1:
            counts = ", ".join(f"`{key}` has {length}" for key, length in lengths.items())
            raise DataError(f"{place}: the columns of `{name}` are of different lengths: {counts}.")
        cell = [dict(zip(cell, turn, strict=True)) for turn in zip(*cell.values(), strict=True)]
    if not isinstance(cell, Sequence) or not cell:
        raise DataError(
            f"{place}: `{name}` must be a list of turns such as "
            f'[{{"role": "user", "content": "..."}}, ...], got {quote(cell)}.'
        )
    return tuple(_turn(turn, f"{place}, `{name}`[{number}]") for number, turn in enumerate(cell))


def read_json(text: str, name: str, place: str) -> Any:
    """Return the value of a column that is JSON in a string."""
    try:
        value, halves = repair(parse_json(text))
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: `{name}` is a string, but not JSON: {error.msg}.") from error
    if halves:
        raise DataError(f"{place}: `{name}` is JSON that holds half of a surrogate pair at {halves[0]}. Correct it.")
    return value


def is_learned(turn: Message) -> bool:
    """Return whether the loss counts this turn: the assistant's, unless a key of it marks it otherwise."""
    wanted = all(turn.extra.get(key, True) for key in (WEIGHT_KEY, *TRAIN_KEYS))
    return turn.role == ASSISTANT and wanted and not any(turn.extra.get(key) for key in MASK_KEYS)


def _turn(turn: Any, place: str) -> Message:
    if not isinstance(turn, Mapping):
        raise DataError(f'{place}: a turn must be like {{"role": "user", "content": "..."}}, got {quote(turn)}.')
    named = "role" if turn.get("role") is not None else "from"
    spoken = "content" if turn.get("content") is not None or "value" not in turn else "value"
    role, content = turn.get(named), turn.get(spoken)
    if not isinstance(role, str):
        raise DataError(f"{place}: the turn has no `role` that is a text; it is {quote(dict(turn))}.")
    extra = {str(key): value for key, value in turn.items() if key not in (named, spoken) and _is_filled(value)}
    # In JSON terms from the start: an index hands the template what the data did.
    extra = json.loads(json.dumps(extra, default=str)) if extra else extra
    role = _role(role, place)
    refuse_media([key for key in MEDIA if key in extra], "key", place)
    if isinstance(content, list) and all(isinstance(part, Mapping) for part in content):
        content = "".join(_text_of(part, f"{place}, `{spoken}`[{at}]") for at, part in enumerate(content))
    if content is None and any(key in extra for key in _CALLS):
        content, extra["content"] = "", None
    if not isinstance(content, str):
        raise DataError(f"{place}: the turn has no `content` that is a text; it is {quote(dict(turn), 200)}.")
    return Message(role, content, extra | _flags(extra, role, place))


def _role(role: str, place: str) -> str:
    plain = role.strip().lower()
    if plain == "function_call":
        raise DataError(
            f"{place}: a turn of the role `{role}`. Write it as the assistant's, with the call in `tool_calls`."
        )
    return ROLES.get(plain, plain if plain in _KNOWN_ROLES else role)


def _flags(extra: Mapping[str, Any], role: str, place: str) -> dict[str, bool | int]:
    """Return the keys that mark whether the turn is learned, as truth values; a weight as 0 or 1."""
    for key in _TURN_DETAILS:
        if key in extra:
            raise DataError(
                f"{place}: `{key}` decides the loss of parts of a turn, which Vestige does not read. Give the row as "
                "`input_ids` with `labels`, or drop the key."
            )
    found: dict[str, bool | int] = {}
    for key in FLAGS:
        if key not in extra:
            continue
        value = truth_of(extra[key])
        if value is None:
            raise DataError(
                f"{place}: `{key}` is {quote(extra[key])}. A turn is learned (1 or true) or not (0 or false); other "
                "weights of turns are not supported. Correct it, or drop the key."
            )
        if key in TRAIN_KEYS and value and role != ASSISTANT:
            raise DataError(
                f"{place}: `{key}` marks as learned a turn of the role {role!r}. Vestige learns the assistant's turns "
                "alone. Give the row as `input_ids` with `labels`, or drop the key."
            )
        found[key] = int(value) if key == WEIGHT_KEY else value
    return found


def truth_of(value: Any) -> bool | None:
    """Return the truth value of a flag: of 1, 1.0, true and "true" True; of their opposites False; else None."""
    if isinstance(value, str):
        return {"true": True, "1": True, "false": False, "0": False}.get(value.strip().lower())
    return bool(value) if isinstance(value, bool | int | float) and value in (0, 1) else None


def _text_of(part: Mapping[str, Any], place: str) -> str:
    """Return the text of one part of a content; a table of parts fills the columns of other kinds with nulls."""
    kind, text = part.get("type"), part.get("text")
    others = [str(key) for key, value in part.items() if key not in _PART_KEYS and _is_filled(value)]
    is_text = kind in _TEXT_PARTS and not others
    if is_text and kind is not None and text is None:
        return ""
    if not is_text or not isinstance(text, str):
        holds = ", ".join(f"`{key}`" for key in others) or "no text"
        raise DataError(
            f"{place}: a part of the type {kind!r} that holds {holds}. Vestige reads text alone, and must not leave "
            "out what the model read. Write it as text, or leave the row out."
        )
    return text


def refuse_media(found: Sequence[str], kind: str, place: str) -> None:
    """Raise where a row or a turn has columns or keys, as `kind` calls them, that are no text."""
    if found:
        raise DataError(
            f"{place}: `{found[0]}` is no text, and Vestige reads text alone. Leave the row out, or drop the {kind} to "
            "have the text without it."
        )


def _is_filled(value: Any) -> bool:
    return value is not None and not (isinstance(value, str | list | dict) and not value)
