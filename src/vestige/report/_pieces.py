"""Tokens as a reader wants them: readable pieces, each known as prompt, answer or template.

A tokenizer may spell its tokens in its own alphabet (`Ġthe`, `▁the`, `Ċ`); here they become the characters they
stand for. What the example's own fields do not contain (chat markers, a default system prompt) is template.
"""

import codecs
import re
from typing import NamedTuple

from vestige.report._read import Wording

PROMPT, ANSWER, TEMPLATE = "p", "a", "t"
_MARKER = re.compile(r"<\|.*\|>|</?s>|<(?:pad|eos|bos|unk)>|\[/?INST\]")
_LOCATE_BY = 24
"""Characters that locate a field whose end was cut off by the context length."""


class Pieces(NamedTuple):
    """A text cut into pieces; entry `i` of every field is piece `i`."""

    texts: tuple[str, ...]
    roles: str
    """One letter per piece: p(rompt), a(nswer) or t(emplate)."""
    targets: tuple[bool, ...]
    """True where the prediction of the piece enters the loss."""
    from_tokens: bool
    """Pieces are the model's tokens, not words cut out by us."""


def cut(wording: Wording) -> Pieces:
    """Return the pieces of `wording`: its tokens where the run has them, otherwise its words."""
    fields = _fields(wording)
    if wording.tokens is None:
        return _cut_words(fields)
    texts = readable_tokens(wording.tokens)
    targets = wording.targets or (False,) * len(texts)
    return Pieces(texts, _roles(texts, targets, fields), targets, from_tokens=True)


def _fields(wording: Wording) -> list[tuple[str, str]]:
    """Return (role letter, text) of each field the user gave, in reading order."""
    if wording.messages:
        return [(ANSWER if role == "assistant" else PROMPT, content) for role, content in wording.messages]
    if wording.text is not None:
        return [(ANSWER, wording.text)]
    parts = ((PROMPT, wording.prompt), (ANSWER, wording.completion))
    return [(role, text) for role, text in parts if text]


def _cut_words(fields: list[tuple[str, str]]) -> Pieces:
    """Return words, each with the white space before it."""
    texts: list[str] = []
    roles: list[str] = []
    for role, text in fields:
        words = re.findall(r"\s*\S+", text)
        texts += words
        roles += [role] * len(words)
    targets = tuple(role == ANSWER for role in roles)
    return Pieces(tuple(texts), "".join(roles), targets, from_tokens=False)


def _roles(texts: tuple[str, ...], targets: tuple[bool, ...], fields: list[tuple[str, str]]) -> str:
    """Return the role letter of each token, found by locating the fields in the joined tokens."""
    joined = "".join(texts)
    letters = [TEMPLATE] * len(joined)
    cursor = 0
    for role, text in fields:
        text = text.strip()
        start = joined.find(text, cursor)
        if start < 0:
            start = joined.find(text[:_LOCATE_BY], cursor)
        if start < 0:  # a tokenizer that rewrites text: only the loss mask is left to tell prompt from answer
            return "".join(_role_by_mask(piece, target) for piece, target in zip(texts, targets, strict=True))
        cursor = min(start + len(text), len(joined))
        letters[start:cursor] = role * (cursor - start)
    roles, start = [], 0
    for piece in texts:
        inside = [letter for letter in letters[start : start + len(piece)] if letter != TEMPLATE]
        roles.append(inside[-1] if inside else TEMPLATE)
        start += len(piece)
    return "".join(roles)


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
