"""Candidates: the training examples whose prompts share words with a query's prompt, the true original kept apart."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from vestige.data import Bm25Variant, Example, LexicalIndex, prompt_of, words_of
from vestige.errors import DataError

BLOCK_SCORES = 2**22
"""Scores held at once, over all training examples."""

Words = Callable[[str], list[str]]


class Candidate(NamedTuple):
    """A training example among the candidates of a query."""

    row: int
    """In the training data."""
    id: str
    score: float
    """BM25 of its prompt with the query's."""


class Candidates(NamedTuple):
    """The candidates of a query, best first."""

    query: str
    """The query's id."""
    listed: tuple[Candidate, ...]
    left_out_ties: int
    """Training examples that are not listed though they score as much as the last one listed (before forcing)."""
    original: Candidate | None
    """The example that the query was made from, of several the one that ranks first; None where it is not known."""
    original_rank: int | None
    """Its rank among all training examples, from 1; examples of equal score rank in the order of the data."""
    original_ties: int
    """Other training examples with its score."""
    forced: bool
    """Whether it took the last place because it had not earned one."""


def find_candidates(
    queries: Sequence[Example],
    training: Sequence[Example],
    *,
    k: int | None = 5,
    originals: Mapping[str, str] | None = None,
    force_original: bool = False,
    words: Words | None = None,
    variant: Bm25Variant = "okapi",
    truth: str = "original_id",
) -> list[Candidates]:
    """For every query the k training examples with the most similar prompts, and where its true original ranks.

    Similarity is BM25 between prompts, as `LexicalIndex` defines it. The original takes part like any other example. It
    gets a place that it has not earned only with `force_original`, and `forced` says so: candidates that always hold
    the truth make every accuracy look better.

    Args:
        queries: Prompts, such as paraphrases or a model's answers to them.
        training: What to choose from.
        k: Candidates of each query; None is all of the training data.
        originals: From ids of queries to ids of training examples. Not given: what `truth` names, else the training
            example with the query's own id, if there is one.
        force_original: Put the original into the last place when it is not listed (what the published study does).
        words: From a prompt to its words. Not given: of Okapi's form what stands between blanks, as published; of
            Lucene's runs of letters and digits, case-folded, as the method `bm25` has it.
        variant: The form of BM25.
        truth: Column of the queries that holds the id of the original, or several.

    Returns:
        One entry for each query, in their order. Examples of equal score are in the order of the training data.

    Raises:
        DataError: k is below 1, no training prompt has a word, or an original is not in the training data.
    """
    if k is not None and k < 1:
        raise DataError(f"k={k}: give a number of candidates above 0, or None for all of the training data.")
    words = words or (str.split if variant == "okapi" else words_of)
    row_of = {example.id: row for row, example in enumerate(training)}
    truths = [_originals(query, row_of, originals, truth) for query in queries]
    asked = [words(prompt_of(query)) for query in queries]
    index = LexicalIndex(asked, (words(prompt_of(example)) for example in training), variant)
    return [
        _choose(query.id, scores, training, len(training) if k is None else k, rows, force_original)
        for query, rows, scores in zip(queries, truths, _by_query(index, len(queries)), strict=True)
    ]


def okapi_scores(
    queries: Sequence[Sequence[str]], documents: Sequence[Sequence[str]]
) -> Iterator[Float[np.ndarray, "document"]]:
    """BM25 in Okapi's form of each query with every document, float64, one query after the other.

    Raises:
        DataError: No document has a word.
    """
    return _by_query(LexicalIndex(queries, documents, "okapi"), len(queries))


def _by_query(index: LexicalIndex, queries: int) -> Iterator[Float[np.ndarray, "document"]]:
    if not index.has_words:
        raise DataError("No training prompt has a word, so BM25 has nothing to compare.")
    step = max(1, BLOCK_SCORES // len(index))
    for start in range(0, queries, step):
        yield from np.ascontiguousarray(index.scores(queries=slice(start, start + step)).T)


def _originals(query: Example, row_of: Mapping[str, int], originals: Mapping[str, str] | None, truth: str) -> list[int]:
    """Rows of the training examples that the query was made from."""
    given: Any = originals.get(query.id) if originals is not None else query.extra.get(truth)
    if given is None and originals is None and query.id in row_of:
        given = query.id
    names = list(given) if isinstance(given, list | tuple | np.ndarray) else [] if given is None else [given]
    for name in map(str, names):
        if name not in row_of:
            raise DataError(
                f"Query {query.id!r} was made from the training example {name!r}, which is not in the training data. "
                "Give the data that the queries were made from."
            )
    return [row_of[str(name)] for name in names]


def _choose(
    query: str, scores: np.ndarray, training: Sequence[Example], k: int, true: Sequence[int], force: bool
) -> Candidates:
    order = np.argsort(-scores, kind="stable")
    listed = order[:k].tolist()
    ties = int((scores[order[k:]] == scores[listed[-1]]).sum())
    rank = int(np.isin(order, true).argmax()) + 1 if true else None
    forced = force and rank is not None and rank > k
    original = None if rank is None else int(order[rank - 1])
    if forced:
        listed[-1] = original

    def named(row: int) -> Candidate:
        return Candidate(row, training[row].id, float(scores[row]))

    return Candidates(
        query=query,
        listed=tuple(named(row) for row in listed),
        left_out_ties=ties,
        original=None if original is None else named(original),
        original_rank=rank,
        original_ties=0 if original is None else int((scores == scores[original]).sum()) - 1,
        forced=forced,
    )
