"""Items of a benchmark that stand in training data: the same words in a row, or nearly the same text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import numpy as np
from jaxtyping import Float

from vestige.data import SuffixArray, words_of
from vestige.errors import SpecError

SPAN = 13
"""Words in a row that count as verbatim; a shorter item has to stand there whole."""
FEWEST_WORDS = 4
"""An item of fewer words is not searched for: it stands anywhere by chance."""
NEAR = 0.5
"""Similarity from which a row is a near copy."""
_COMMON = 0.05
"""Share of the items in which words of a row are the frame of a task, such as its instruction, and say nothing."""
_BLOCK = 2_000
"""Rows that are compared with all items at once."""

Kind = Literal["verbatim", "near copy", "clean", "too short"]


class Span(NamedTuple):
    """Words of an item that stand in a row, in the same order without a gap."""

    row: int
    words: int
    begin: int
    """Position of the first of them among the words of the item."""


@dataclass(frozen=True)
class Match:
    """What of the training data is most like one item."""

    kind: Kind
    row: int | None
    """Of the training data; None for an item that is clean or too short."""
    words: int
    """Of the longest span; 0 where none is long enough."""
    share: float
    """Of the item's words that this span has."""
    text: str
    """The span, in lower case."""
    similarity: float
    """Of the most similar row, 0 to 1."""
    similar: int
    """That row."""


def find_matches(items: Sequence[str], rows: Sequence[str], *, span: int = SPAN, near: float = NEAR) -> list[Match]:
    """Return, for each item, where it stands in the rows.

    Verbatim: `span` words in a row (letters and digits in lower case), or a shorter item whole; 13 as in Brown et al.
    2020, "Language models are few-shot learners". Words that more than 5 % of the items share, and two
    at least, are the frame of the task and do not count. A near copy: the cosine of TF-IDF vectors of four letters
    within words is `near` or more, rarity being that of rows and items together. A near copy inside a much longer row
    is not found.

    Args:
        items: Texts of the benchmark, with their answers.
        rows: Texts of the training data.
        span: Words.
        near: Above 0, at most 1.

    Raises:
        SpecError: A span below 1 or a similarity outside (0, 1].
    """
    if span < 1 or not 0 < near <= 1:
        raise SpecError(f"span={span}, near={near}: give 1 or more words, and a similarity above 0 and at most 1.")
    words = [words_of(item) for item in items]
    spans = find_spans(words, map(words_of, rows), span=span)
    similarity, similar = _find_similar(items, rows)
    found = []
    for own, longest, value, other in zip(words, spans, similarity, similar, strict=True):
        kind: Kind = "verbatim" if longest is not None else "near copy" if value >= near else "clean"
        kind = "too short" if len(own) < FEWEST_WORDS else kind
        row = longest.row if longest is not None else int(other) if kind == "near copy" else None
        count, begin = (longest.words, longest.begin) if longest is not None else (0, 0)
        text = " ".join(own[begin : begin + count])
        found.append(Match(kind, row, count, count / max(len(own), 1), text, float(value), int(other)))
    return found


def find_spans(items: Sequence[Sequence[str]], rows: Iterable[Sequence[str]], *, span: int = SPAN) -> list[Span | None]:
    """Return the longest run of words that each item shares with a row, the first row of several; None if too short.

    The words of all rows are sorted once, in memory (`vestige.data.SuffixArray`).
    """
    lengths = [min(span, len(item)) if len(item) >= FEWEST_WORDS else 0 for item in items]
    pieces = [
        [tuple(item[begin : begin + length]) for begin in range(len(item) - length + 1 if length else 0)]
        for item, length in zip(items, lengths, strict=True)
    ]
    holding = Counter(piece for own in pieces for piece in set(own))
    most = max(2, int(_COMMON * len(items)))
    numbers: dict[str, int] = {}
    texts = [[numbers.setdefault(word, len(numbers)) for word in row] for row in rows]
    searched = SuffixArray.build(map(np.array, texts), len(numbers))
    found: list[Span | None] = []
    for item, length, own in zip(items, lengths, pieces, strict=True):
        words = [numbers.get(word, len(numbers)) for word in item]
        begins = [begin for begin, piece in enumerate(own) if holding[piece] <= most]
        counts = {begin: searched.count_common(words[begin:]) for begin in begins}
        longest = max(counts.values(), default=0)
        ends = [(begin, words[begin : begin + longest]) for begin in begins if counts[begin] == longest >= length]
        places = [(int(searched.locate(searched.find(run))[0][0]), begin) for begin, run in ends]
        found.append(Span(min(places)[0], longest, min(places)[1]) if places else None)
    return found


def _find_similar(items: Sequence[str], rows: Sequence[str]) -> tuple[Float[np.ndarray, "item"], np.ndarray]:
    """Return the largest cosine of each item with a row, and that row."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    best, where = np.zeros(len(items)), np.zeros(len(items), dtype=np.int64)
    if not items or not rows:
        return best, where
    vectors = TfidfVectorizer(analyzer="char_wb", ngram_range=(4, 4), sublinear_tf=True, dtype=cast(Any, np.float32))
    try:
        vectors.fit([*rows, *items])
    except ValueError:  # Nothing but white space.
        return best, where
    asked = vectors.transform(items)
    for begin in range(0, len(rows), _BLOCK):
        found = (asked @ vectors.transform(rows[begin : begin + _BLOCK]).T).toarray()
        place = found.argmax(1)
        values = found[np.arange(len(items)), place]
        better = values > best
        best[better], where[better] = values[better], begin + place[better]
    return best, where
