"""BM25 between texts given as words: both usual forms, in memory that does not grow with the documents."""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from os import SEEK_END
from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from vestige.storage import open_temporary, temporary_error

Bm25Variant = Literal["lucene", "okapi"]

K1, B = 1.5, 0.75
EPSILON = 0.25
"""Of the mean rarity, in place of one below zero: Okapi's form."""


class LexicalIndex:
    """BM25 (Robertson and Zaragoza 2009) of some queries with all documents.

    With `f` the occurrences of a word in a document of `l` words, `N` documents of which `df` hold the word, each
    occurrence of the word in a query adds

        lucene:  rarity * f / (f + k1 (1 - b + b l / mean l)),           rarity = log(1 + (N - df + 0.5) / (df + 0.5)),
        okapi:   rarity * f (k1 + 1) / (f + k1 (1 - b + b l / mean l)),  rarity = log((N - df + 0.5) / (df + 0.5)),

    with k1 = 1.5 and b = 0.75. In Okapi's form a rarity below zero becomes a quarter of the mean rarity of all words,
    as in the `rank_bm25` package; it is computed in float64, Lucene's in float32.

    The documents are read once and not kept. Kept are their lengths and how often they hold words of the queries, on
    the disk; for Okapi's mean also the number of documents of every word.
    """

    def __init__(
        self,
        queries: Sequence[Sequence[str]],
        documents: Iterable[Sequence[str]],
        variant: Bm25Variant = "lucene",
        *,
        block_numbers: int = 2**16,
    ) -> None:
        """Read all queries and documents.

        Args:
            queries: The words of each.
            documents: The same of each document, in order.
            variant: Which form.
            block_numbers: Documents, and pairs of a document and a word that it holds, that are in memory at once.

        Raises:
            DiskSpaceError: The disk that has temporary files is full.
        """
        vocabulary = {word: column for column, word in enumerate(sorted({word for query in queries for word in query}))}
        self._type = np.float32 if variant == "lucene" else np.float64
        self._queries = _matrix([Counter(query) for query in queries], vocabulary, self._type)
        self._file = open_temporary()
        weakref.finalize(self, self._file.close)
        self._sizes: list[list[int]] = []
        """Numbers in the parts of each block of documents in the file."""
        self._count = self._words = 0
        self._holding = np.zeros(len(vocabulary), dtype=np.int64)
        everywhere = self._read(documents, vocabulary, block_numbers, every_word=variant == "okapi")
        self._blocks = list(self._map_blocks())
        self._mean_length = self._words / self._count if self._count else 0.0
        if variant == "lucene":
            self._rarity = np.log1p((self._count - self._holding + 0.5) / (self._holding + 0.5))
        else:
            self._rarity = _okapi_rarity(self._count, self._holding)
            mean = _okapi_rarity(self._count, np.array(list(everywhere.values()))).mean() if everywhere else 0.0
            self._rarity[self._rarity < 0] = EPSILON * mean
        self._scale = 1.0 if variant == "lucene" else K1 + 1

    def __len__(self) -> int:
        """Return the number of documents."""
        return self._count

    @property
    def has_words(self) -> bool:
        """Return whether any document has a word: without one there is nothing to compare."""
        return self._words > 0

    def scores(
        self, *, documents: slice = slice(None), queries: slice = slice(None)
    ) -> Float[np.ndarray, "document query"]:
        """Return the scores of some queries with some documents; a part equals that of the whole, to the bit."""
        wanted = self._queries[queries].T
        start, stop, _ = documents.indices(len(self))
        found = [np.empty((0, wanted.shape[1]), dtype=self._type)]
        for first, lengths, counts in self._blocks:
            if start < first + len(lengths) and first < stop:
                inside = slice(max(start - first, 0), stop - first)
                found.append((self._weights(lengths[inside], counts[inside]) @ wanted).toarray())
        return np.concatenate(found)

    def _read(
        self, documents: Iterable[Sequence[str]], vocabulary: dict[str, int], block_numbers: int, *, every_word: bool
    ) -> Counter[str]:
        """Put the counts of all documents aside, and return the number of documents of every word if it is wanted."""
        everywhere: Counter[str] = Counter()
        lengths, held, numbers = list[int](), list[Counter[str]](), 0
        for words in documents:
            lengths.append(len(words))
            held.append(Counter(word for word in words if word in vocabulary))
            numbers += 1 + len(held[-1])
            if every_word:
                everywhere.update(dict.fromkeys(words, 1))
            if numbers >= block_numbers:
                self._put_aside(lengths, _matrix(held, vocabulary, np.int32))
                lengths, held, numbers = [], [], 0
        if held:
            self._put_aside(lengths, _matrix(held, vocabulary, np.int32))
        return everywhere

    def _put_aside(self, lengths: list[int], counts: sparse.csr_matrix) -> None:
        """Write the next documents behind the others: their lengths, and how often each holds each word."""
        begin = self._file.seek(0, SEEK_END)
        parts = (np.array(lengths), counts.indptr, counts.indices, counts.data)
        content = np.concatenate(parts).astype("<i4")
        try:
            self._file.write(content.tobytes())
            self._file.flush()
        except OSError as error:
            raise temporary_error(error, begin) from error
        self._sizes.append([len(part) for part in parts])
        self._count += len(lengths)
        self._words += sum(lengths)
        self._holding += np.bincount(counts.indices, minlength=len(self._holding))

    def _map_blocks(self) -> Iterator[tuple[int, np.ndarray, sparse.csr_matrix]]:
        """Yield each block: the number of its first document, their lengths, and how often each holds each word."""
        content, begin, first = np.memmap(self._file, "<i4", "r") if self._sizes else np.empty(0), 0, 0
        for sizes in self._sizes:
            lengths, ends, columns, often = np.split(content[begin : begin + sum(sizes)], np.cumsum(sizes)[:-1])
            yield first, lengths, sparse.csr_matrix((often, columns, ends), shape=(sizes[0], len(self._holding)))
            begin, first = begin + sum(sizes), first + sizes[0]

    def _weights(self, lengths: np.ndarray, counts: sparse.csr_matrix) -> sparse.csr_matrix:
        """Return what each word adds to the score of a query that holds it once, [document, word]."""
        often = counts.data.astype(np.float64)
        long = np.repeat(lengths, np.diff(counts.indptr)) / self._mean_length
        weights = self._rarity[counts.indices] * often * self._scale / (often + K1 * (1 - B + B * long))
        return sparse.csr_matrix((weights.astype(self._type), counts.indices, counts.indptr), shape=counts.shape)


def _okapi_rarity(documents: int, holding: Int[np.ndarray, " word"]) -> Float[np.ndarray, " word"]:
    return np.log(documents - holding + 0.5) - np.log(holding + 0.5)


def _matrix(counts: Sequence[Counter[str]], columns: dict[str, int], kind: type) -> sparse.csr_matrix:
    """Return how often each word occurs in each text, [text, word]."""
    ends = np.cumsum([0, *map(len, counts)])
    words = np.fromiter((columns[word] for count in counts for word in count), np.int64, int(ends[-1]))
    often = np.fromiter((number for count in counts for number in count.values()), kind, int(ends[-1]))
    return sparse.csr_matrix((often, words, ends), shape=(len(counts), len(columns)))
