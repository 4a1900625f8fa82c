"""Which words of an example also stand, in the same order, in the question or in the answer."""

import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from vestige.reports._pieces import ANSWER, SYSTEM, Pieces

MIN_WORDS = 3
"""A common run of at least this many words counts as verbatim."""
MIN_RARE_SHARE = 0.6
"""A shorter run counts when at least this share of its words is rare..."""
MIN_RARE_LETTERS = 8
"""...and it has at least this many letters."""
_WORD = re.compile(r"\w+(?:['’]\w+)*")
_BREAK = ""
"""Stands between two fields, so that no run crosses from a question into its answer; it matches nothing."""


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


def words_of(pieces: Pieces) -> list[Word]:
    """Return the words of prompt and answer in order, with a break between turns.

    The template and system turns are left out: that all conversations of a data set begin alike is no overlap.
    """
    words: list[Word] = []
    for start, stop, _ in pieces.turns:
        role = pieces.roles[start]
        if role != SYSTEM:
            words += _words_of_field(pieces.texts, start, stop, role == ANSWER)
            words.append(Word(_BREAK, start, start, False))
    return words


def _words_of_field(texts: tuple[str, ...], start: int, stop: int, in_answer: bool) -> Iterable[Word]:
    """Yield the words of pieces [start, stop), which belong to one field."""
    piece_of = [number for number in range(start, stop) for _ in texts[number]]
    for match in _WORD.finditer("".join(texts[start:stop])):
        yield Word(match[0].casefold(), piece_of[match.start()], piece_of[match.end() - 1], in_answer)


def rare_words(texts: Iterable[list[Word]]) -> frozenset[str]:
    """Return the words that stand in at most a tenth of the texts (and in no more than two of a few)."""
    counts: Counter[str] = Counter()
    total = 0
    for words in texts:
        counts.update({word.text for word in words})
        total += 1
    limit = max(2, total // 10)
    return frozenset(text for text, count in counts.items() if count <= limit and text != _BREAK)


def overlap(query: list[Word], example: list[Word], rare: frozenset[str]) -> Overlap:
    """Return where `query` and `example` agree word for word.

    Every maximal common run counts that has at least `MIN_WORDS` words, or whose words are mostly rare.
    """
    in_query: set[int] = set()
    in_example: set[int] = set()
    for query_stop, example_stop, length in _maximal_runs(query, example):
        run = [word.text for word in query[query_stop - length : query_stop]]
        if _is_verbatim(run, rare):
            in_query.update(range(query_stop - length, query_stop))
            in_example.update(range(example_stop - length, example_stop))
    answer = [number for number, word in enumerate(query) if word.in_answer and word.text != _BREAK]
    share = sum(number in in_query for number in answer) / len(answer) if answer else None
    return Overlap(_piece_ranges(example, in_example), _piece_ranges(query, in_query), share)


def _is_verbatim(run: list[str], rare: frozenset[str]) -> bool:
    if len(run) >= MIN_WORDS:
        return True
    rare_share = sum(text in rare for text in run) / len(run)
    return rare_share >= MIN_RARE_SHARE and sum(map(len, run)) >= MIN_RARE_LETTERS


def _maximal_runs(query: list[Word], example: list[Word]) -> Iterable[tuple[int, int, int]]:
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


def _piece_ranges(words: list[Word], chosen: set[int]) -> tuple[tuple[int, int], ...]:
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
