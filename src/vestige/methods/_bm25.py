"""Lexical retrieval: which examples share rare words with the question and its answer."""

import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import sparse

from vestige.data import Example
from vestige.errors import DataError
from vestige.methods._protocol import Job
from vestige.methods._registry import method
from vestige.runs import Meaning, ScoreBlock

BLOCK_SCORES = 2**22
"""Scores made at once, over all queries."""

K1 = 1.5
B = 0.75

_WORD = re.compile(r"\w+")


@method("bm25")
class Bm25:
    """BM25 (Robertson and Zaragoza 2009, in Lucene's form) between a query's prompt with answer and whole examples.

    With `f` the occurrences of a word in an example, `l` the example's length in words and `df` the number of
    examples that hold the word, each occurrence of the word in the query adds

        log(1 + (N - df + 0.5) / (df + 0.5)) * f / (f + k1 (1 - b + b l / mean l)),    k1 = 1.5, b = 0.75.

    Words are runs of letters and digits, case-folded: no stemming and no stop words, so no language is preferred. Of
    a conversation the contents of all turns are read, without the names of the roles.
    """

    name: str
    needs_model = False
    needs_gradients = False
    needs_index = False
    needs_exact = False
    meaning = Meaning(
        sign="no causal reading: zero = no word in common, higher = more and rarer words in common, never negative",
        unit="BM25",
        target="text alone",
        normalisation="example length, as in BM25 (k1 = 1.5, b = 0.75)",
        estimates="Word overlap of the example with the query's prompt and answer, rare words counting more.",
        cost="No pass through the model; memory grows with the words that examples share with the queries.",
        limits="Finds examples that state the same words, whether or not training on them changed the model; "
        "blind to paraphrase.",
    )

    def blocks(self, job: Job) -> Iterator[ScoreBlock]:
        """Scores of all rows, in order.

        Raises:
            DataError: no training example has any words.
        """
        queries = [Counter(example_words(example)) for example in job.queries.examples]
        vocabulary, asked = _asked(queries)
        corpus = _read(map(example_words, job.train.examples), vocabulary)
        step = max(1, BLOCK_SCORES // max(len(job.queries), 1))
        for start in range(0, len(corpus.lengths), step):
            rows = slice(start, start + step)
            scores = _weights(corpus, rows) @ asked
            yield ScoreBlock(torch.arange(start, start + len(scores)), torch.from_numpy(np.ascontiguousarray(scores.T)))


def lexical_scores(
    asked: Sequence[Sequence[str]], documents: Sequence[Sequence[str]]
) -> Float[np.ndarray, "query document"]:
    """BM25 of every query with every document, each given as its words; the formula is that of `Bm25`.

    Raises:
        DataError: no document has any words.
    """
    vocabulary, counts = _asked([Counter(words) for words in asked])
    corpus = _read(documents, vocabulary)
    return np.ascontiguousarray((_weights(corpus, slice(0, len(documents))) @ counts).T)


def _asked(queries: Sequence[Counter[str]]) -> tuple[dict[str, int], Float[np.ndarray, "word query"]]:
    """The words of the queries with their columns, and how often each query holds them."""
    vocabulary = {word: column for column, word in enumerate(sorted({word for query in queries for word in query}))}
    asked = np.zeros((len(vocabulary), len(queries)), dtype=np.float32)
    for number, query in enumerate(queries):
        for word, count in query.items():
            asked[vocabulary[word], number] = count
    return vocabulary, asked


def prompt_words(example: Example) -> list[str]:
    """The words of what was asked: of the prompt, of the user's first turn, or of a text, which has no prompt."""
    asked = next((message.content for message in example.messages if message.role == "user"), None)
    return _WORD.findall((asked or example.prompt or example.display).casefold())


def example_words(example: Example) -> list[str]:
    """The words of an example: of its text, of prompt and completion, or of the contents of all its turns."""
    turns = [message.content for message in example.messages]
    return _WORD.findall(("\n".join(turns) if turns else example.display).casefold())


class _Corpus(NamedTuple):
    """What the scores of some queries need to know of all examples: nothing of words that no query holds."""

    lengths: Int[np.ndarray, "example"]
    """Words of each example."""
    counts: sparse.csr_matrix
    """How often each word of the queries occurs in each example, [example, word]."""
    words: int
    """Different words of the queries."""


def _read(documents: Iterable[Sequence[str]], vocabulary: dict[str, int]) -> _Corpus:
    """One pass over the words of the examples, of which none is kept."""
    lengths, ends = array("q"), array("q", [0])
    columns, counts = array("i"), array("i")
    for words in documents:
        found = Counter(vocabulary[word] for word in words if word in vocabulary)
        lengths.append(len(words))
        columns.extend(found.keys())
        counts.extend(found.values())
        ends.append(len(columns))
    if not any(lengths):
        raise DataError(
            "The method `bm25` compares words, and no training example has any.\n"
            "Give the data as text (`text`, or `prompt` and `completion`), or choose another --method."
        )
    stored = (np.array(part) for part in (counts, columns, ends))
    matrix = sparse.csr_matrix(tuple(stored), shape=(len(lengths), len(vocabulary)))
    return _Corpus(np.array(lengths), matrix, len(vocabulary))


def _weights(corpus: _Corpus, rows: slice) -> sparse.csr_matrix:
    """BM25 weight of each word of the queries in some examples, float32 [example, word]."""
    holding = np.bincount(corpus.counts.indices, minlength=corpus.words)
    rarity = np.log1p((len(corpus.lengths) - holding + 0.5) / (holding + 0.5))
    counts = corpus.counts[rows]
    often = counts.data.astype(np.float64)
    long = np.repeat(corpus.lengths[rows], np.diff(counts.indptr)) / corpus.lengths.mean()
    weights = rarity[counts.indices] * often / (often + K1 * (1 - B + B * long))
    return sparse.csr_matrix((weights.astype(np.float32), counts.indices, counts.indptr), shape=counts.shape)
