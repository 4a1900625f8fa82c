"""Tokens as a reader wants them: readable pieces, each known as prompt, answer or template.

A tokenizer may spell its tokens in its own alphabet (`Ġthe`, `▁the`, `Ċ`); here they become the characters they
stand for. What the example's own fields do not contain (chat markers, a default system prompt) is template.
"""

import codecs
import re
from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

from vestige.reports._read import Wording

SYSTEM, PROMPT, ANSWER, TEMPLATE = "s", "p", "a", "t"
_MARKER = re.compile(r"<\|.*\|>|</?s>|<(?:pad|eos|bos|unk)>|\[/?INST\]")
_LOCATE_BY = 24
"""Characters that locate a field whose end was cut off by the context length."""


class Turn(NamedTuple):
    """Neighbouring pieces of one field: what one party of a conversation says, a prompt, an answer or a text."""

    start: int
    stop: int
    """Not included."""
    name: str
    """What the page calls it."""


class Pieces(NamedTuple):
    """A text cut into pieces; entry `i` of every field is piece `i`."""

    texts: tuple[str, ...]
    roles: str
    """One letter per piece: s(ystem), p(rompt), a(nswer) or t(emplate)."""
    targets: tuple[bool, ...]
    """True where the prediction of the piece enters the loss."""
    from_tokens: bool
    """Pieces are the model's tokens, not words cut out by us."""
    turns: tuple[Turn, ...]
    """In order; pieces in none of them are template."""


class Field(NamedTuple):
    """A text that the user gave."""

    role: str
    """Its letter."""
    name: str
    text: str


def cut(wording: Wording) -> Pieces:
    """Return the pieces of `wording`: its tokens where the run has them, otherwise its words."""
    fields = _fields(wording)
    if wording.tokens is None:
        return _cut_words(fields)
    texts = readable_tokens(wording.tokens)
    targets = wording.targets or (False,) * len(texts)
    owners = _owners(texts, fields)
    if owners is None:  # a tokenizer that rewrites text: only the loss mask separates prompt from answer
        roles = [_role_by_mask(piece, target) for piece, target in zip(texts, targets, strict=True)]
        names = {PROMPT: "Prompt", ANSWER: "Answer", TEMPLATE: None}
        return Pieces(texts, "".join(roles), targets, True, _turns(roles, [names[role] for role in roles]))
    roles = [TEMPLATE if owner is None else fields[owner].role for owner in owners]
    names = [None if owner is None else fields[owner].name for owner in owners]
    return Pieces(texts, "".join(roles), targets, True, _turns(owners, names))


def _fields(wording: Wording) -> list[Field]:
    """Return each field the user gave, in reading order."""
    if wording.messages:
        letters = {"assistant": ANSWER, "system": SYSTEM, "developer": SYSTEM}
        return [Field(letters.get(role, PROMPT), role.capitalize(), content) for role, content in wording.messages]
    if wording.text is not None:
        return [Field(ANSWER, "Answer", wording.text)]
    parts = ((PROMPT, "Prompt", wording.prompt), (ANSWER, "Answer", wording.completion))
    return [Field(role, name, text) for role, name, text in parts if text]


def _cut_words(fields: list[Field]) -> Pieces:
    """Return words, each with the white space before it."""
    texts: list[str] = []
    owners: list[int] = []
    for number, field in enumerate(fields):
        words = re.findall(r"\s*\S+", field.text)
        texts += words
        owners += [number] * len(words)
    roles = [fields[owner].role for owner in owners]
    targets = tuple(role == ANSWER for role in roles)
    return Pieces(tuple(texts), "".join(roles), targets, False, _turns(owners, [fields[own].name for own in owners]))


def _turns(owners: Sequence[Any], names: Sequence[str | None]) -> tuple[Turn, ...]:
    """Return the runs of pieces with one owner; those without a name are in no turn."""
    found, start = [], 0
    for _, run in groupby(owners):
        stop = start + len(list(run))
        if (name := names[start]) is not None:
            found.append(Turn(start, stop, name))
        start = stop
    return tuple(found)


def _owners(texts: tuple[str, ...], fields: list[Field]) -> list[int | None] | None:
    """Return the number of each token's field, found by locating the fields in the joined tokens.

    None for a token of the template; None as a whole where a field is not found.
    """
    joined = "".join(texts)
    letters: list[int | None] = [None] * len(joined)
    cursor = 0
    for number, field in enumerate(fields):
        text = field.text.strip()
        start = joined.find(text, cursor)
        if start < 0:
            start = joined.find(text[:_LOCATE_BY], cursor)
        if start < 0:
            return None
        cursor = min(start + len(text), len(joined))
        letters[start:cursor] = [number] * (cursor - start)
    owners, start = [], 0
    for piece in texts:
        inside = [letter for letter in letters[start : start + len(piece)] if letter is not None]
        owners.append(inside[-1] if inside else None)
        start += len(piece)
    return owners


def _role_by_mask(piece: str, target: bool) -> str:
    if _MARKER.fullmatch(piece.strip()):
        return TEMPLATE
    return ANSWER if target else PROMPT


def readable_tokens(tokens: tuple[str, ...]) -> tuple[str, ...]:
    """Return the characters that each token stands for; decoded tokens pass through unchanged.

    A character spread over several byte-level tokens is given to the token that completes it.
    """
    if any(" " in token or "\n" in token for token in tokens):
        return tokens  # no tokenizer's own alphabet has a space: these were decoded before
    if any("Ġ" in token or "Ċ" in token for token in tokens):
        return _decode_byte_level(tokens)
    return tuple(token.replace("▁", " ").replace("<0x0A>", "\n") for token in tokens)


def _decode_byte_level(tokens: tuple[str, ...]) -> tuple[str, ...]:
    alphabet = _byte_alphabet()
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    texts = []
    for token in tokens:
        if all(character in alphabet for character in token):
            texts.append(decoder.decode(bytes(alphabet[character] for character in token)))
        else:
            texts.append(token)
    return tuple(texts)


def _byte_alphabet() -> dict[str, int]:
    """Return the byte of each printable stand-in that GPT-2's byte-level tokenizer uses (Radford et al. 2019)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    alphabet.update({chr(0x100 + offset): byte for offset, byte in enumerate(others)})
    return alphabet
