"""Texts that say almost the same as a flagged one: they share most of their word triples."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from vestige.progress import progress

WORDS = 3
"""Words of a shingle; a shorter text is one shingle."""
_ROUNDING = 1e-9
"""0.7 times 10 is 7, and not a little more."""


class Copy(NamedTuple):
    """A text that goes because another stays."""

    kept: int
    """The row that stays."""
    similarity: float
    """Jaccard's index with the text that it was found by."""


def near_copies(texts: Sequence[Sequence[str]], flagged: Sequence[int], least: float) -> dict[int, Copy]:
    """Rows to take out: all but the first of every group of texts that hang together through flagged ones.

        similarity = |A and B| / |A or B|, A and B being the sets of word triples of the two texts

    Every text is compared exactly with every flagged one that can be so similar: two texts are not unless the rarest
    triples of one, as many as it may lack, hold one of the other's (Chaudhuri et al. 2006, prefix filtering). Two texts
    of which neither is flagged are never compared. Case, spaces and punctuation do not count.

    Args:
        texts: Of all rows; a row may have several, and no triple goes from one to the next.
        flagged: The rows that are flagged.
        least: Similarity from which on a text is a copy, above 0 and at most 1.
    """
    of_flagged = {row: _shingles(texts[row]) for row in flagged}
    common = Counter(shingle for found in of_flagged.values() for shingle in found)

    def rarest(own: set[str]) -> list[str]:
        spare = len(own) - math.ceil(least * len(own) - _ROUNDING) + 1
        return sorted(own, key=lambda shingle: (common[shingle], shingle))[:spare]

    holders: dict[str, list[int]] = {}
    for row, found in of_flagged.items():
        for shingle in rarest(found):
            holders.setdefault(shingle, []).append(row)
    groups, best = _Groups(), dict[int, float]()
    with progress(len(texts), "Comparing", "rows") as bar:
        for row, several in enumerate(texts):
            own = of_flagged[row] if row in of_flagged else _shingles(several)
            for other in {held for shingle in rarest(own) for held in holders.get(shingle, ())} - {row}:
                similarity = len(own & of_flagged[other]) / len(own | of_flagged[other])
                if similarity >= least:
                    groups.join(row, other)
                    best[row] = max(best.get(row, 0.0), similarity)
                    best[other] = max(best.get(other, 0.0), similarity)
            bar.advance(1)
    return {row: Copy(groups.first(row), best[row]) for row in sorted(best) if groups.first(row) != row}


def shingles(text: str) -> set[str]:
    """The word triples of a text, without differences in case, spaces and punctuation."""
    words = re.sub(r"\W+", " ", text.casefold()).split()
    return {" ".join(words[place : place + WORDS]) for place in range(max(len(words) - WORDS + 1, 1))}


def _shingles(texts: Sequence[str]) -> set[str]:
    return set().union(*map(shingles, texts))


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
