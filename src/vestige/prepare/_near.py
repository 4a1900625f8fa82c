"""Texts that say almost the same as a flagged one: they share most of their word triples."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

WORDS = 3
"""Words of a shingle; a shorter text is one shingle."""


class Copy(NamedTuple):
    """A text that goes because another stays."""

    kept: int
    """The row that stays."""
    similarity: float
    """Jaccard's index with the text that it was found by."""


def near_copies(texts: Sequence[str], flagged: Sequence[int], least: float) -> dict[int, Copy]:
    """Rows to take out: all but the first of every group of texts that hang together through flagged ones.

        similarity = |A and B| / |A or B|, A and B being the sets of word triples of the two texts

    Every text is compared exactly with every flagged one that it shares a triple with; two texts of which neither is
    flagged are never compared. Case, spaces and punctuation do not count.

    Args:
        texts: Of all rows.
        flagged: The rows that are flagged.
        least: Similarity from which on a text is a copy, above 0 and at most 1.
    """
    of_flagged = {row: shingles(texts[row]) for row in flagged}
    holders: dict[str, list[int]] = {}
    for row, found in of_flagged.items():
        for shingle in found:
            holders.setdefault(shingle, []).append(row)
    groups, best = _Groups(), dict[int, float]()
    for row, text in enumerate(texts):
        own = of_flagged[row] if row in of_flagged else shingles(text)
        shared = Counter(other for shingle in own for other in holders.get(shingle, ()) if other != row)
        for other, count in shared.items():
            similarity = count / (len(own) + len(of_flagged[other]) - count)
            if similarity >= least:
                groups.join(row, other)
                for each in (row, other):
                    best[each] = max(best.get(each, 0.0), similarity)
    return {row: Copy(groups.first(row), best[row]) for row in sorted(best) if groups.first(row) != row}


def shingles(text: str) -> set[str]:
    """The word triples of a text, without differences in case, spaces and punctuation."""
    words = re.sub(r"\W+", " ", text.casefold()).split()
    return {" ".join(words[place : place + WORDS]) for place in range(max(len(words) - WORDS + 1, 1))}


class _Groups:
    """Rows that hang together, each group known by its first row."""

    def __init__(self) -> None:
        self._above: dict[int, int] = {}

    def first(self, row: int) -> int:
        while row in self._above:
            row = self._above[row]
        return row

    def join(self, one: int, other: int) -> None:
        low, high = sorted((self.first(one), self.first(other)))
        if low != high:
            self._above[high] = low
