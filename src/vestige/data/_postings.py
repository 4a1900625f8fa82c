"""Counts of a few words in documents, in memory that does not grow with the documents: the rest lies on the disk."""

import weakref
from array import array
from collections.abc import Mapping
from typing import NamedTuple, final

import numpy as np
from jaxtyping import Int
from scipy import sparse

from vestige.scratch import Scratch

_HELD_BYTES = 2**22
"""What more bytes than that are put aside in is a temporary file."""
_BLOCK_NUMBERS = 2**18
"""Documents, and pairs of a document and a word that it holds, that are put aside and read together."""


class Counted(NamedTuple):
    """Some consecutive documents."""

    lengths: Int[np.ndarray, "document"]
    """Words in each."""
    counts: sparse.csr_matrix
    """How often each holds each word, [document, word]."""


class _Block(NamedTuple):
    """Position of consecutive documents in the file."""

    first: int
    """Number of the first document."""
    stop: int
    begin: int
    """Bytes before them."""
    pairs: int
    """Of a document and a word that it holds."""


@final
class Postings:
    """Documents are added one by one, `finish`ed, and then read by their numbers, as often as need be."""

    def __init__(self, words: int) -> None:
        """Start with no document.

        Args:
            words: How many words are counted; they are called by their numbers.
        """
        self._words = words
        self._scratch = Scratch.temporary(_HELD_BYTES)
        weakref.finalize(self, self._scratch.close)
        self._blocks: list[_Block] = []
        self._written = 0
        self.length = 0
        """Words in all documents, summed."""
        self.holding = np.zeros(words, dtype=np.int64)
        """Documents that hold each word."""
        self._begin(0)

    def __len__(self) -> int:
        """Return the number of documents."""
        return self._first + len(self._lengths)

    def add(self, length: int, found: Mapping[int, int]) -> None:
        """Add the next document.

        Args:
            length: Its words, all counted.
            found: How often it holds which of the words.

        Raises:
            DiskSpaceError: The disk that has temporary files is full.
        """
        self._lengths.append(length)
        self._columns.extend(found.keys())
        self._counts.extend(found.values())
        self._ends.append(len(self._columns))
        self.length += length
        if len(self._lengths) + len(self._columns) >= _BLOCK_NUMBERS:
            self._put_aside()

    def finish(self) -> None:
        """End the documents: no further one comes."""
        if self._lengths:
            self._put_aside()

    def read(self, documents: slice) -> list[Counted]:
        """Return consecutive documents, in blocks as they were put aside."""
        first, stop, _ = documents.indices(len(self))
        wanted = [block for block in self._blocks if block.first < stop and first < block.stop]
        return [self._read(block, slice(max(first - block.first, 0), stop - block.first)) for block in wanted]

    def _begin(self, first: int) -> None:
        self._first = first
        self._lengths, self._ends = array("i"), array("i", [0])
        self._columns, self._counts = array("i"), array("i")

    def _put_aside(self) -> None:
        self.holding += np.bincount(np.array(self._columns, dtype=np.int32), minlength=self._words)
        self._blocks.append(_Block(self._first, len(self), self._written, len(self._columns)))
        for part in (self._lengths, self._ends, self._columns, self._counts):
            self._scratch.write(memoryview(part))
            self._written += part.itemsize * len(part)
        self._begin(len(self))

    def _read(self, block: _Block, inside: slice) -> Counted:
        documents = block.stop - block.first
        sizes = (documents, documents + 1, block.pairs, block.pairs)
        content = np.frombuffer(self._scratch.read(block.begin, 4 * sum(sizes)), dtype=np.int32)
        lengths, ends, columns, counts = np.split(content, np.cumsum(sizes)[:-1])
        held = sparse.csr_matrix((counts, columns, ends), shape=(documents, self._words))
        return Counted(lengths[inside], held[inside])
