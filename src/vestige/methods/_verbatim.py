"""Verbatim retrieval: which examples hold pieces of the question or its answer, word for word."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from vestige.data import Example
from vestige.methods._bm25 import example_words
from vestige.methods._protocol import Job, Method, method
from vestige.runs import Meaning, ScoreBlock

WORDS = 4
"""Of a piece: shorter ones are phrases that any two texts share."""
_ROWS = 4096
"""Examples of a block."""


@method("verbatim")
class Verbatim(Method):
    """Pieces of four words in a row that an example and the query, or its answer, have in common, rare ones first.

    A piece that `df` of the examples hold adds `1 / df`, so that a sentence of one example outweighs what all repeat.
    Words are those of `bm25`.
    """

    searches_words = True
    meaning = Meaning(
        sign="no causal reading: zero = no four words in a row in common, higher = more and rarer ones, never negative",
        unit="pieces of four words, each over the number of examples that hold it",
        target="text alone",
        normalisation="number of examples with the piece",
        estimates="How much of the query and its answer stands in the example word for word.",
        cost="No pass through the model; two passes over the texts.",
        limits="Blind to any change of a word; finds texts, whether or not training on them changed the model.",
    )

    def blocks(self, job: Job) -> Iterator[ScoreBlock]:
        """Yield the scores of all rows, in order."""
        queries = [_pieces(example) for example in job.queries.examples]
        wanted = set[tuple[str, ...]]().union(*queries)
        holding = Counter(piece for example in job.train.examples for piece in _pieces(example) & wanted)
        for start in range(0, len(job.train), _ROWS):
            examples: Sequence[Example] = job.train.examples[start : start + _ROWS]
            scores = np.zeros((len(queries), len(examples)))
            for place, example in enumerate(examples):
                held = _pieces(example) & wanted
                for number, query in enumerate(queries):
                    scores[number, place] = sum(1 / holding[piece] for piece in sorted(held & query))
            yield ScoreBlock(np.arange(start, start + len(examples)), scores)  # type: ignore[arg-type]


def _pieces(example: Example) -> set[tuple[str, ...]]:
    words = example_words(example)
    return {tuple(words[at : at + WORDS]) for at in range(len(words) - WORDS + 1)}
