"""Which texts of a row are paraphrased, and the row with other texts in their places."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from vestige.data import Example
from vestige.errors import DataError

_ROLES = {"prompt": "user", "answer": "assistant"}


class Place(NamedTuple):
    """A text inside a row."""

    part: str
    """prompt, answer or text."""
    turn: int | None = None
    """Which turn of a conversation."""


def texts_of(example: Example, parts: Sequence[str]) -> dict[Place, str]:
    """The texts of the row that `parts` name, without the blanks around them.

    Raises:
        DataError: The row has none of one of the parts.
    """
    found: dict[Place, str] = {}
    for part in parts:
        here = _places(example, part)
        if not here:
            has = ", ".join(each for each in ("prompt", "answer", "text") if _places(example, each)) or "none of them"
            raise DataError(
                f"Row {example.row} (id {example.id!r}) has no {part} to paraphrase; of prompt, answer and text it has "
                f"{has}. Choose with --fields."
            )
        found |= here
    return {place: text.strip() for place, text in found.items()}


def with_texts(example: Example, texts: Mapping[Place, str]) -> Example:
    """The row with these texts in their places, the blanks around them as before."""
    messages = list(example.messages)
    fields: dict[str, str] = {}
    for place, text in texts.items():
        before = _places(example, place.part)[place]
        if place.turn is not None:
            messages[place.turn] = replace(messages[place.turn], content=_dressed(text, before))
        else:
            fields["completion" if place.part == "answer" else place.part] = _dressed(text, before)
    return replace(example, messages=tuple(messages), **fields)


def _places(example: Example, part: str) -> dict[Place, str]:
    if example.messages:
        role = _ROLES.get(part)
        return {
            Place(part, turn): message.content for turn, message in enumerate(example.messages) if message.role == role
        }
    text = {"prompt": example.prompt, "answer": example.completion, "text": example.text}[part]
    return {} if text is None else {Place(part): text}


def _dressed(text: str, before: str) -> str:
    """The blanks at both ends of a text separate it from what stands beside it: they are not the paraphraser's."""
    if not before.strip():
        return text or before
    start = len(before) - len(before.lstrip())
    return before[:start] + text + before[len(before.rstrip()) :]
