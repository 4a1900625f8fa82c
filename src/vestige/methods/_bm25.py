"""Lexical retrieval: which examples share rare words with the question and its answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, cast

import numpy as np
from jaxtyping import Float

from vestige.data import Example, LexicalIndex, prompt_of, words_of
from vestige.errors import DataError
from vestige.methods._protocol import Job, Method, method
from vestige.runs import Meaning, ScoreBlock


@method("bm25")
class Bm25(Method):
    """BM25 (Robertson and Zaragoza 2009, in Lucene's form) between a query's prompt with answer and whole examples.

    With `f` the occurrences of a word in an example, `l` the example's length in words and `df` the number of
    examples that hold the word, each occurrence of the word in the query adds

        log(1 + (N - df + 0.5) / (df + 0.5)) * f / (f + k1 (1 - b + b l / mean l)),    k1 = 1.5, b = 0.75.

    Words are runs of letters and digits, case-folded: no stemming and no stop words, so no language is preferred. Of
    a conversation the contents of all turns are read, without the names of the roles.
    """

    searches_words = True
    baseline = 1
    block_scores: ClassVar[int] = 2**18
    """Scores made at once, over all queries."""
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
        """Yield the scores of all rows, in order.

        Raises:
            DataError: no training example has any words.
        """
        index = _index(list(map(example_words, job.queries.examples)), map(example_words, job.train.examples))
        step = max(1, self.block_scores // max(len(job.queries), 1))
        for start in range(0, len(index), step):
            scores = index.scores(documents=slice(start, start + step))
            rows: Any = np.arange(start, start + len(scores))
            yield ScoreBlock(rows, cast(Any, np.ascontiguousarray(scores.T)))


def lexical_scores(
    queries: Sequence[Sequence[str]], documents: Sequence[Sequence[str]]
) -> Float[np.ndarray, "query document"]:
    """Compute BM25 of every query with every document, each given as its words; the formula is that of `Bm25`.

    Raises:
        DataError: no document has any words.
    """
    return np.ascontiguousarray(_index(queries, documents).scores().T)


def prompt_words(example: Example) -> list[str]:
    """Return the words of the request: of the prompt, of the user's first turn, or of a text, which has no prompt."""
    return words_of(prompt_of(example))


def example_words(example: Example) -> list[str]:
    """Return the words of an example: of its text, of prompt and completion, or of the contents of all its turns."""
    turns = [message.content for message in example.messages]
    return words_of("\n".join(turns) if turns else example.display)


def _index(queries: Sequence[Sequence[str]], documents: Iterable[Sequence[str]]) -> LexicalIndex:
    index = LexicalIndex(queries, documents, "lucene")
    if not index.has_words:
        raise DataError(
            "The method `bm25` compares words, and no training example has any.\n"
            "Give the data as text (`text`, or `prompt` and `completion`), or choose another --method."
        )
    return index
