"""Where tokens stand word for word: the sorted suffixes of rows, and the spans that a text has in common with them."""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple, final

import numpy as np
from jaxtyping import Int, UInt

LISTED = 5
"""Places of a span that are listed; all of them are counted."""
_SPACES = ("Ġ", "▁")
"""How tokenizers spell the space before a word."""


@final
class SuffixArray:
    """The suffixes of all rows in order, so that a run of tokens is found by bisection, however many rows there are.

    Tokens are numbers with the most significant byte first, so that the order of bytes is that of tokens. Behind each
    row stands a zero, which is no token's number: no run crosses it.
    """

    def __init__(
        self, text: UInt[np.ndarray, "place"], order: Int[np.ndarray, "place"], starts: Int[np.ndarray, "border"]
    ) -> None:
        """Use what `build` made; arrays that are mapped into memory stay on the disk.

        Args:
            text: One more than each token, big-endian, a zero behind each row.
            order: Places in `text`, by what stands there and after it.
            starts: Where each row begins, and the length of `text`.
        """
        self.text, self.order, self.starts = text, order, starts
        self._bytes = text.view(np.uint8).data

    @classmethod
    def build(cls, rows: Iterable[Int[np.ndarray, "token"]], largest: int) -> "SuffixArray":
        """Sort the suffixes of rows; 2 bytes a token where no token is above 65,534, otherwise 4.

        Time and memory grow with the tokens: libdivsufsort sorts the bytes, and those within a token are left out.

        Args:
            rows: Token ids of each; they may be empty.
            largest: No token is above it.
        """
        from pydivsufsort import divsufsort

        dtype = np.dtype(">u2" if largest + 1 < 2**16 else ">u4")
        parts = [np.append(np.asarray(row, dtype=np.int64) + 1, 0).astype(dtype) for row in rows]
        starts = np.cumsum([0, *map(len, parts)])
        text = np.concatenate([*parts, np.zeros(0, dtype)], dtype=dtype)  # else it were of the order of this machine
        if not len(text):
            return cls(text, np.zeros(0, dtype=np.int32), starts)
        order = divsufsort(text.view(np.uint8))
        return cls(text, order[order % dtype.itemsize == 0] // dtype.itemsize, starts)

    def find(self, tokens: Sequence[int]) -> range:
        """Return the suffixes that begin with these tokens, as a range of `order`."""
        wanted = self._encode(tokens)
        begin = self._bisect(wanted)
        return range(begin, bisect_right(self.order, wanted, lo=begin, key=self._reader(len(wanted))))

    def count_common(self, tokens: Sequence[int]) -> int:
        """Return how many of the first tokens stand in a row without a gap, 0 if not even the first one does."""
        wanted = self._encode(tokens)
        place, read = self._bisect(wanted), self._reader(len(wanted))
        # What has most in common with it stands right before or behind where it would stand itself.
        near = [read(self.order[at]) for at in (place - 1, place) if 0 <= at < len(self.order)]
        return max((_count_equal(wanted, found) // self.text.itemsize for found in near), default=0)

    def locate(self, found: range) -> tuple[Int[np.ndarray, "found"], Int[np.ndarray, "found"]]:
        """Return row, and position in the row, of each of these suffixes, by row and position."""
        places = np.sort(self.order[found.start : found.stop]).astype(np.int64)
        rows = np.searchsorted(self.starts, places, side="right") - 1
        return rows, places - self.starts[rows]

    def _bisect(self, wanted: bytes) -> int:
        return bisect_left(self.order, wanted, key=self._reader(len(wanted)))

    def _reader(self, size: int) -> Any:
        """Return a function that reads the bytes, `size` at most, of the suffix at a place."""
        width, text = self.text.itemsize, self._bytes
        return lambda place: text[int(place) * width : int(place) * width + size].tobytes()

    def _encode(self, tokens: Sequence[int]) -> bytes:
        return (np.asarray(tokens, dtype=np.int64) + 1).astype(self.text.dtype).tobytes()


def _count_equal(one: bytes, other: bytes) -> int:
    """Return how many of the first bytes are equal."""
    size = min(len(one), len(other))
    equal = np.frombuffer(one, np.uint8, size) == np.frombuffer(other, np.uint8, size)
    return size if equal.all() else int(equal.argmin())


class TokenSpan(NamedTuple):
    """A run of a text's tokens that stands in rows, and is part of no longer one."""

    start: int
    """Position of its first token in the text."""
    stop: int
    occurrences: int
    rows: int
    """Different ones in which it stands."""
    places: tuple[tuple[int, int], ...]
    """Row, and position in it, of the first occurrence in each of the first `LISTED` rows."""
    rarity: float
    """Sum over its tokens of log(all tokens / those equal to it), nats: high for long ones and for rare words."""


@final
class TokenSearch:
    """Suffix arrays of parts of the data, which follow one another, searched as one."""

    def __init__(self, parts: Sequence[SuffixArray]) -> None:
        """Search these parts, in the order of their rows."""
        self._parts = parts
        self._firsts = np.cumsum([0, *(len(part.starts) - 1 for part in parts)])

    @cached_property
    def tokens(self) -> int:
        """The number of tokens in all rows."""
        return sum(len(part.text) - (len(part.starts) - 1) for part in self._parts)

    def find(self, tokens: Sequence[int], least: int, twins: Mapping[int, int] | None = None) -> list[TokenSpan]:
        """Return every run of these tokens that stands in a row and cannot be made longer, the rarest first.

        Args:
            tokens: The text that is searched for.
            least: Tokens of the shortest run.
            twins: Tokens that may stand for others at the beginning of a run, as `space_twins` returns them.
        """
        twins, tokens = twins or {}, [int(token) for token in tokens]

        def forms(start: int, stop: int | None = None) -> Iterator[list[int]]:
            yield tokens[start:stop]
            if tokens[start] in twins:
                yield [twins[tokens[start]], *tokens[start + 1 : stop]]

        stops = [0]
        for start in range(len(tokens)):
            common = (part.count_common(form) for form in forms(start) for part in self._parts)
            stops.append(start + max(common, default=0))
        found = []
        for start, (before, stop) in enumerate(pairwise(stops)):
            # One that ends where the one before it does is a part of that.
            if stop - start >= least and stop > before:
                rows, positions = self._locate(list(forms(start, stop)))
                first = np.unique(rows, return_index=True)[1]
                listed = zip(rows[first[:LISTED]].tolist(), positions[first[:LISTED]].tolist(), strict=True)
                rarity = sum(self._rarity(forms(at, at + 1)) for at in range(start, stop))
                found.append(TokenSpan(start, stop, len(rows), len(first), tuple(listed), rarity))
        return sorted(found, key=lambda span: (-span.rarity, span.start))

    def _locate(self, forms: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Return row and position of every occurrence of any of the forms, by row and position."""
        rows, positions = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for part, first in zip(self._parts, self._firsts, strict=False):
            for form in forms:
                some, at = part.locate(part.find(form))
                rows.append(some + first)
                positions.append(at)
        row, position = np.concatenate(rows), np.concatenate(positions)
        order = np.lexsort((position, row))
        return row[order], position[order]

    def _rarity(self, forms: Iterable[Sequence[int]]) -> float:
        count = sum(len(part.find(form)) for form in forms for part in self._parts)
        return math.log(self.tokens / count)


def space_twins(tokenizer: Any, tokens: Iterable[int]) -> dict[int, int]:
    """Return, for tokens that begin a word, the token of the same word with, or without, the space before it.

    A word is spelled without the space at the beginning of a text and with it inside. Words of which one form takes
    several tokens have no twin.

    Args:
        tokenizer: The model's; None gives none.
        tokens: Ids.
    """
    twins: dict[int, int] = {}
    if tokenizer is None:
        return twins
    for token in {int(token) for token in tokens}:
        word = tokenizer.convert_ids_to_tokens(token) or ""
        for other in [word[1:]] if word.startswith(_SPACES) else [space + word for space in _SPACES]:
            twin = tokenizer.convert_tokens_to_ids(other) if other and word else None
            if twin is not None and tokenizer.convert_ids_to_tokens(twin) == other:
                twins[token] = twin
    return twins
