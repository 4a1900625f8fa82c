"""BM25 between texts given as words: both usual forms, in memory that does not grow with the documents."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from vestige.data._postings import Counted, Postings
from vestige.data._types import Example

Bm25Variant = Literal["lucene", "okapi"]

K1, B = 1.5, 0.75
EPSILON = 0.25
"""Of the mean rarity, in place of one below zero: Okapi's form."""

_WORD = re.compile(r"\w+")


class LexicalIndex:
    """BM25 (Robertson and Zaragoza 2009) of some queries with all documents.

    With `f` the occurrences of a word in a document of `l` words, `N` documents of which `df` hold the word, each
    occurrence of the word in a query adds

        lucene:  rarity * f / (f + k1 (1 - b + b l / mean l)),           rarity = log(1 + (N - df + 0.5) / (df + 0.5)),
        okapi:   rarity * f (k1 + 1) / (f + k1 (1 - b + b l / mean l)),  rarity = log((N - df + 0.5) / (df + 0.5)),

    with k1 = 1.5 and b = 0.75. In Okapi's form a rarity below zero becomes a quarter of the mean rarity of all words,
    as in the `rank_bm25` package; it is computed in float64, Lucene's in float32.

    The documents are read once and not kept. Kept are their lengths and how often they hold words of the queries, on
    the disk if that is much; for Okapi's mean also the number of documents of every word.
    """

    def __init__(
        self, queries: Sequence[Sequence[str]], documents: Iterable[Sequence[str]], variant: Bm25Variant = "lucene"
    ) -> None:
        """Read all queries and documents.

        Args:
            queries: The words of each.
            documents: The same of each document, in order.
            variant: Which form.
        """
        vocabulary = {word: column for column, word in enumerate(sorted({word for query in queries for word in query}))}
        self._type = np.float32 if variant == "lucene" else np.float64
        self._asked = _matrix([Counter(query) for query in queries], vocabulary, self._type)
        self._read(documents, vocabulary, variant)

    def __len__(self) -> int:
        """Return the number of documents."""
        return len(self._postings)

    @property
    def has_words(self) -> bool:
        """Return whether any document has a word: without one there is nothing to compare."""
        return self._postings.length > 0

    def scores(
        self, *, documents: slice = slice(None), queries: slice = slice(None)
    ) -> Float[np.ndarray, "document query"]:
        """Return the scores of some queries with some documents; a part equals that of the whole, to the bit."""
        wanted = self._asked[queries].T
        found = [(self._weights(each) @ wanted).toarray() for each in self._postings.read(documents)]
        return np.concatenate(found) if found else np.empty((0, wanted.shape[1]), dtype=self._type)

    def _read(self, documents: Iterable[Sequence[str]], vocabulary: dict[str, int], variant: Bm25Variant) -> None:
        self._postings = Postings(len(vocabulary))
        everywhere: Counter[str] = Counter()
        for words in documents:
            self._postings.add(len(words), Counter(vocabulary[word] for word in words if word in vocabulary))
            if variant == "okapi":
                everywhere.update(dict.fromkeys(words, 1))
        self._postings.finish()
        count, holding = len(self), self._postings.holding
        self._mean_length = self._postings.length / count if count else 0.0
        if variant == "lucene":
            self._rarity = np.log1p((count - holding + 0.5) / (holding + 0.5))
        else:
            self._rarity = _okapi_rarity(count, holding)
            mean = _okapi_rarity(count, np.array(list(everywhere.values()))).mean() if everywhere else 0.0
            self._rarity[self._rarity < 0] = EPSILON * mean
        self._scale = 1.0 if variant == "lucene" else K1 + 1

    def _weights(self, documents: Counted) -> sparse.csr_matrix:
        """Return what each word adds to the score of a query that holds it once, [document, word]."""
        lengths, counts = documents
        often = counts.data.astype(np.float64)
        long = np.repeat(lengths, np.diff(counts.indptr)) / self._mean_length
        weights = self._rarity[counts.indices] * often * self._scale / (often + K1 * (1 - B + B * long))
        return sparse.csr_matrix((weights.astype(self._type), counts.indices, counts.indptr), shape=counts.shape)


def words_of(text: str) -> list[str]:
    """Return runs of letters and digits, case-folded: no stemming and no stop words, so no language is preferred."""
    return _WORD.findall(text.casefold())


def prompt_of(example: Example) -> str:
    """Return the question: the first turn of the user, or the prompt; the whole text where there is neither."""
    question = next((message.content for message in example.messages if message.role == "user"), None)
    return question or example.prompt or example.display


def _okapi_rarity(documents: int, holding: Int[np.ndarray, " word"]) -> Float[np.ndarray, " word"]:
    return np.log(documents - holding + 0.5) - np.log(holding + 0.5)


def _matrix(counts: Sequence[Counter[str]], columns: dict[str, int], kind: type) -> sparse.csr_matrix:
    """Return how often each word occurs in each text, [text, word]."""
    ends = np.cumsum([0, *map(len, counts)])
    words = np.fromiter((columns[word] for count in counts for word in count), np.int64, int(ends[-1]))
    often = np.fromiter((number for count in counts for number in count.values()), kind, int(ends[-1]))
    return sparse.csr_matrix((often, words, ends), shape=(len(counts), len(columns)))
