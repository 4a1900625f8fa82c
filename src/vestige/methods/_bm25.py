"""Lexical retrieval: which examples share rare words with the question and its answer."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from bm25s import BM25
from jaxtyping import Float
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
        cost="No pass through the model; memory grows with the distinct words of each example.",
        limits="Finds examples that state the same words, whether or not training on them changed the model; "
        "blind to paraphrase.",
    )

    def blocks(self, job: Job) -> Iterator[ScoreBlock]:
        """Scores of all rows, in order.

        Raises:
            DataError: no training example has any words.
        """
        words = [example_words(example) for example in job.train.examples]
        weights, vocabulary = _weights(words)
        queries = _query_counts([example_words(example) for example in job.queries.examples], vocabulary)
        step = max(1, BLOCK_SCORES // max(len(job.queries), 1))
        for start in range(0, len(words), step):
            scores = (weights[start : start + step] @ queries).toarray()
            rows = torch.arange(start, start + len(scores))
            yield ScoreBlock(rows, torch.from_numpy(np.ascontiguousarray(scores.T)))


def example_words(example: Example) -> list[str]:
    """The words of an example: of its text, of prompt and completion, or of the contents of all its turns."""
    turns = [message.content for message in example.messages]
    return _WORD.findall(("\n".join(turns) if turns else example.display).casefold())


def _weights(words: Sequence[Sequence[str]]) -> tuple[sparse.csr_matrix, dict[str, int]]:
    """BM25 weight of each word in each example, [example, word], and the column of each word."""
    if not any(words):
        raise DataError(
            "The method `bm25` compares words, and no training example has any.\n"
            "Give the data as text (`text`, or `prompt` and `completion`), or choose another --method."
        )
    index = BM25(k1=K1, b=B, method="lucene")
    index.index([list(row) for row in words], show_progress=False)
    stored = index.scores
    shape = (len(words), len(stored["indptr"]) - 1)
    columns = sparse.csc_matrix((stored["data"], stored["indices"], stored["indptr"]), shape=shape)
    # bm25s adds an empty word, without a column, where an example has none.
    vocabulary = {word: column for word, column in index.vocab_dict.items() if word}
    return sparse.csr_matrix(columns), vocabulary


def _query_counts(
    queries: Sequence[Sequence[str]], vocabulary: dict[str, int]
) -> Float[sparse.csc_matrix, "word query"]:
    """How often each known word occurs in each query."""
    entries = [
        (vocabulary[word], number, count)
        for number, query in enumerate(queries)
        for word, count in Counter(query).items()
        if word in vocabulary
    ]
    words, numbers, counts = zip(*entries, strict=True) if entries else ((), (), ())
    shape = (len(vocabulary), len(queries))
    return sparse.csc_matrix((np.array(counts, dtype=np.float32), (words, numbers)), shape=shape)
