"""Tokens as a reader wants them: readable pieces, each known as prompt, answer or template; and verbatim overlap.

A tokenizer may spell its tokens in its own alphabet (`Ġthe`, `▁the`, `Ċ`); here they become the characters they
stand for. What the example's own fields do not contain (chat markers, a default system prompt) is template.
"""

import codecs
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import NamedTuple

from vestige.runs import SYSTEM_ROLES, Wording

SYSTEM, PROMPT, ANSWER, TEMPLATE = "s", "p", "a", "t"
_MARKER = re.compile(r"<\|.*\|>|</?s>|<(?:pad|eos|bos|unk)>|\[/?INST\]")
_LOCATE_BY = 24
"""Characters that locate a field whose end was cut off by the context length."""

MIN_WORDS = 3
"""A common run of at least this many words counts as verbatim."""
MIN_RARE_SHARE, MIN_RARE_LETTERS = 0.6, 8
"""A shorter run counts when at least this share of its words is rare and it has at least this many letters."""
_WORD = re.compile(r"\w+(?:['’]\w+)*")
_BREAK = ""
"""Stands between two fields, so that no run crosses from a question into its answer; it matches nothing."""


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
    text: str = ""


def cut(wording: Wording) -> Pieces:
    """Return the pieces of `wording`: its tokens where the run has them, otherwise its words."""
    fields = _list_fields(wording)
    if wording.tokens is None:
        # Words, each with the white space before it.
        owned = [(field, word) for field in fields for word in re.findall(r"\s*\S+", field.text)]
        owners, texts = [field for field, _ in owned], tuple(word for _, word in owned)
        targets = tuple(field.role == ANSWER for field in owners)
    else:
        texts = read_tokens(wording.tokens)
        targets = wording.targets or (False,) * len(texts)
        owners = _find_owners(texts, fields, targets)
    roles = "".join(TEMPLATE if owner is None else owner.role for owner in owners)
    return Pieces(texts, roles, targets, wording.tokens is not None, _find_turns(owners))


def find_system(wordings: Iterable[Wording]) -> str | None:
    """Return the system prompt that all of them begin with; None where one has another, or none."""
    found = {wording.messages[:1] for wording in wordings}
    first = next(iter(found), ())
    return first[0][1] if len(found) == 1 and first and first[0][0] in SYSTEM_ROLES else None


def _list_fields(wording: Wording) -> list[Field]:
    """Return each field the user gave, in reading order."""
    if wording.messages:
        letters = {"assistant": ANSWER, **dict.fromkeys(SYSTEM_ROLES, SYSTEM)}
        return [Field(letters.get(role, PROMPT), role.capitalize(), content) for role, content in wording.messages]
    if wording.text is not None:
        return [Field(ANSWER, "Text", wording.text)]
    parts = ((PROMPT, "Prompt", wording.prompt), (ANSWER, "Answer", wording.completion))
    return [Field(role, name, text) for role, name, text in parts if text]


def _find_turns(owners: Sequence[Field | None]) -> tuple[Turn, ...]:
    """Return the runs of pieces of one field; those of none are in no turn."""
    found, start = [], 0
    for _, run in groupby(owners, key=id):
        owner, *others = run
        stop = start + 1 + len(others)
        if owner is not None:
            found.append(Turn(start, stop, owner.name))
        start = stop
    return tuple(found)


def _find_owners(texts: Sequence[str], fields: Sequence[Field], targets: Sequence[bool]) -> Sequence[Field | None]:
    """Return the field of each token, found by locating the fields in the joined tokens; None for the template's.

    A last answer that is not found, because half a character ends it, has the tokens that enter the loss. Where no
    field is found, the tokenizer rewrites text: only the loss mask separates prompt from answer then.
    """
    joined = "".join(texts)
    letters: list[Field | None] = [None] * len(joined)
    cursor, found = 0, list[Field]()
    for field in fields:
        text = field.text.strip()
        start = joined.find(text, cursor)
        if start < 0:
            start = joined.find(text[:_LOCATE_BY], cursor)
        if start < 0:
            continue
        found.append(field)
        cursor = min(start + len(text), len(joined))
        letters[start:cursor] = [field] * (cursor - start)
    marks = [_MARKER.fullmatch(piece.strip()) is not None for piece in texts]
    if not found:
        prompt, answer = Field(PROMPT, "Prompt"), Field(ANSWER, "Answer")
        return [None if mark else answer if target else prompt for mark, target in zip(marks, targets, strict=True)]
    lost = fields[-1] if fields[-1] is not found[-1] and fields[-1].role == ANSWER else None
    owners, start = [], 0
    for piece, target, mark in zip(texts, targets, marks, strict=True):
        inside = [letter for letter in letters[start : start + len(piece)] if letter is not None]
        owners.append(inside[-1] if inside else lost if target and not mark else None)
        start += len(piece)
    return owners


def read_tokens(tokens: tuple[str, ...]) -> tuple[str, ...]:
    """Return the characters that each token stands for; decoded tokens pass through unchanged.

    A character spread over several byte-level tokens is given to the token that completes it.
    """
    if any(" " in token or "\n" in token for token in tokens):
        return tokens  # no tokenizer's own alphabet has a space: these were decoded before
    if not any("Ġ" in token or "Ċ" in token for token in tokens):
        return tuple(token.replace("▁", " ").replace("<0x0A>", "\n") for token in tokens)
    alphabet, decoder = _make_byte_alphabet(), codecs.getincrementaldecoder("utf-8")("replace")
    return tuple(
        decoder.decode(bytes(alphabet[character] for character in token))
        if all(character in alphabet for character in token)
        else token
        for token in tokens
    )


def _make_byte_alphabet() -> dict[str, int]:
    """Return the byte of each printable stand-in that GPT-2's byte-level tokenizer uses (Radford et al. 2019)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    alphabet.update({chr(0x100 + offset): byte for offset, byte in enumerate(others)})
    return alphabet


class Word(NamedTuple):
    """A word and the pieces it is spread over."""

    text: str
    first: int
    last: int
    in_answer: bool


class Overlap(NamedTuple):
    """Verbatim overlap of one example with one query; ranges are [start, stop) over pieces."""

    example: tuple[tuple[int, int], ...]
    query: tuple[tuple[int, int], ...]
    share: float | None
    """Share of the answer's words found verbatim in the example, 0 to 1; None for an answer without words."""


def split_words(pieces: Pieces) -> list[Word]:
    """Return the words of prompt and answer in order, with a break between turns.

    The template and system turns are left out: that all conversations of a data set begin alike is no overlap.
    """
    words: list[Word] = []
    for start, stop, _ in pieces.turns:
        role = pieces.roles[start]
        if role != SYSTEM:
            owner = [number for number in range(start, stop) for _ in pieces.texts[number]]
            for match in _WORD.finditer("".join(pieces.texts[start:stop])):
                first, last = owner[match.start()], owner[match.end() - 1]
                words.append(Word(match[0].casefold(), first, last, role == ANSWER))
            words.append(Word(_BREAK, start, start, False))
    return words


def find_rare_words(texts: Iterable[list[Word]]) -> frozenset[str]:
    """Return the words that stand in at most a tenth of the texts (and in no more than two of a few)."""
    listed = list(texts)
    counts = Counter(text for words in listed for text in {word.text for word in words})
    limit = max(2, len(listed) // 10)
    return frozenset(text for text, count in counts.items() if count <= limit and text != _BREAK)


def find_overlap(query: list[Word], example: list[Word], rare: frozenset[str]) -> Overlap:
    """Return where `query` and `example` agree word for word.

    Every maximal common run counts that has at least `MIN_WORDS` words, or whose words are mostly rare.
    """
    in_query: set[int] = set()
    in_example: set[int] = set()
    for query_stop, example_stop, length in _find_maximal_runs(query, example):
        run = [word.text for word in query[query_stop - length : query_stop]]
        if _is_verbatim(run, rare):
            in_query.update(range(query_stop - length, query_stop))
            in_example.update(range(example_stop - length, example_stop))
    answer = [number for number, word in enumerate(query) if word.in_answer and word.text != _BREAK]
    share = sum(number in in_query for number in answer) / len(answer) if answer else None
    return Overlap(_join_ranges(example, in_example), _join_ranges(query, in_query), share)


def _is_verbatim(run: list[str], rare: frozenset[str]) -> bool:
    if len(run) >= MIN_WORDS:
        return True
    rare_share = sum(text in rare for text in run) / len(run)
    return rare_share >= MIN_RARE_SHARE and sum(map(len, run)) >= MIN_RARE_LETTERS


def _find_maximal_runs(query: list[Word], example: list[Word]) -> Iterable[tuple[int, int, int]]:
    """Yield (end in query, end in example, words) of every common run that extends no further either way."""
    positions: dict[str, list[int]] = {}
    for number, word in enumerate(query):
        if word.text != _BREAK:
            positions.setdefault(word.text, []).append(number)
    lengths: dict[int, int] = {}  # by position in the query: words of the run that ends there
    for number, word in enumerate(example):
        following = {place: lengths.get(place - 1, 0) + 1 for place in positions.get(word.text, ())}
        yield from ((place + 1, number, size) for place, size in lengths.items() if place + 1 not in following)
        lengths = following
    yield from ((place + 1, len(example), size) for place, size in lengths.items())


def _join_ranges(words: list[Word], chosen: set[int]) -> tuple[tuple[int, int], ...]:
    """Return the piece ranges of the chosen words, neighbouring words joined."""
    ranges: list[tuple[int, int]] = []
    previous = -2
    for number in sorted(chosen):
        word = words[number]
        if ranges and (number == previous + 1 or word.first < ranges[-1][1]):
            ranges[-1] = (ranges[-1][0], word.last + 1)
        else:
            ranges.append((word.first, word.last + 1))
        previous = number
    return tuple(ranges)
