"""Candidates: the training examples whose prompts share words with a query's prompt, the true original kept apart."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import sparse

from vestige.data import Example
from vestige.errors import DataError

K1, B, EPSILON = 1.5, 0.75, 0.25
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
    """The example that the query was made from; None where that is not known."""
    original_rank: int | None
    """Its rank among all training examples, from 1; examples of equal score rank in the order of the data."""
    original_ties: int
    """Other training examples with its score."""
    forced: bool
    """Whether it took the last place because it had not earned one."""


def candidates(
    queries: Sequence[Example],
    training: Sequence[Example],
    *,
    k: int | None = 5,
    originals: Mapping[str, str] | None = None,
    force_original: bool = False,
    words: Words = str.split,
) -> list[Candidates]:
    """For every query the k training examples with the most similar prompts, and where its true original ranks.

    Similarity is BM25 between prompts, as `okapi_scores` defines it. The original takes part like any other example. It
    gets a place that it has not earned only with `force_original`, and `forced` says so: candidates that always hold
    the truth make every accuracy look better.

    Args:
        queries: Prompts, such as paraphrases or a model's answers to them.
        training: What to choose from.
        k: Candidates of each query; None is all of the training data.
        originals: From ids of queries to ids of training examples. Not given: the `original_id` of a query, else the
            training example with the query's own id, if there is one.
        force_original: Put the original into the last place when it is not listed (what the published study does).
        words: From a prompt to its words; the default splits at blanks and keeps capitals.

    Returns:
        One entry for each query, in their order. Examples of equal score are in the order of the training data.

    Raises:
        DataError: k is below 1, no training prompt has a word, or an original is not in the training data.
    """
    if k is not None and k < 1:
        raise DataError(f"k={k}: give a number of candidates above 0, or None for all of the training data.")
    row_of = {example.id: row for row, example in enumerate(training)}
    truth = [_original(query, row_of, originals) for query in queries]
    asked = [words(prompt_of(query)) for query in queries]
    rows_of_scores = okapi_scores(asked, [words(prompt_of(example)) for example in training])
    return [
        _choose(query.id, scores, training, len(training) if k is None else k, true, force_original)
        for query, true, scores in zip(queries, truth, rows_of_scores, strict=True)
    ]


def okapi_scores(
    queries: Sequence[Sequence[str]], documents: Sequence[Sequence[str]]
) -> Iterator[Float[np.ndarray, "document"]]:
    """BM25 of each query with every document, float64, one query after the other.

    Okapi's form (Robertson and Zaragoza 2009) with the floor that the `rank_bm25` package gives it: with `f` the
    occurrences of a word in a document of `l` words, and `df` the documents that hold it, each occurrence of the word
    in the query adds

        rarity * f (k1 + 1) / (f + k1 (1 - b + b l / mean l)),    rarity = log((N - df + 0.5) / (df + 0.5)),

    where a rarity below zero becomes `epsilon` times the mean rarity of all words; k1 = 1.5, b = 0.75, epsilon = 0.25.

    Raises:
        DataError: No document has a word.
    """
    if not any(documents):
        raise DataError("No training prompt has a word, so BM25 has nothing to compare.")
    counts = [Counter(document) for document in documents]
    columns = {word: column for column, word in enumerate(dict.fromkeys(word for count in counts for word in count))}
    weights = _weights(counts, columns, np.array([len(document) for document in documents]))
    step = max(1, BLOCK_SCORES // len(documents))
    for start in range(0, len(queries), step):
        block = [Counter(word for word in query if word in columns) for query in queries[start : start + step]]
        yield from (weights @ _matrix(block, columns).T).toarray().T


def prompt_of(example: Example) -> str:
    """What is asked: the first turn of the user, the prompt, or a text, which has none."""
    if example.messages:
        return next((message.content for message in example.messages if message.role == "user"), "")
    return example.prompt if example.prompt is not None else example.text or ""


def _weights(counts: list[Counter[str]], columns: dict[str, int], lengths: np.ndarray) -> sparse.csr_matrix:
    """What each word of each document adds to the score of a query that holds it once, [document, word]."""
    often = _matrix(counts, columns)
    holding = np.bincount(often.indices, minlength=len(columns))
    rarity = np.log(len(counts) - holding + 0.5) - np.log(holding + 0.5)
    rarity = np.where(rarity < 0, EPSILON * rarity.mean(), rarity)
    long = np.repeat(lengths / lengths.mean(), np.diff(often.indptr))
    often.data = rarity[often.indices] * often.data * (K1 + 1) / (often.data + K1 * (1 - B + B * long))
    return often


def _matrix(counts: list[Counter[str]], columns: dict[str, int]) -> sparse.csr_matrix:
    """How often each word occurs in each text, float64 [text, word]."""
    ends = np.cumsum([0, *map(len, counts)])
    words = np.fromiter((columns[word] for count in counts for word in count), np.int64, int(ends[-1]))
    often = np.fromiter((number for count in counts for number in count.values()), np.float64, int(ends[-1]))
    return sparse.csr_matrix((often, words, ends), shape=(len(counts), len(columns)))


def _original(query: Example, row_of: Mapping[str, int], originals: Mapping[str, str] | None) -> int | None:
    """The row of the training example that the query was made from."""
    if originals is not None:
        name = originals.get(query.id)
    else:
        given = query.extra.get("original_id")
        name = str(given) if given is not None else query.id if query.id in row_of else None
    if name is None:
        return None
    if name not in row_of:
        raise DataError(
            f"Query {query.id!r} was made from the training example {name!r}, which is not in the training data. "
            "Give the data that the queries were made from."
        )
    return row_of[name]


def _choose(
    query: str, scores: np.ndarray, training: Sequence[Example], k: int, true: int | None, force: bool
) -> Candidates:
    order = np.argsort(-scores, kind="stable")
    listed = order[:k].tolist()
    ties = int((scores[order[k:]] == scores[listed[-1]]).sum())
    rank = None if true is None else int(np.flatnonzero(order == true)[0]) + 1
    forced = force and rank is not None and rank > k
    if forced:
        listed[-1] = true

    def named(row: int) -> Candidate:
        return Candidate(row, training[row].id, float(scores[row]))

    return Candidates(
        query=query,
        listed=tuple(named(row) for row in listed),
        left_out_ties=ties,
        original=None if true is None else named(true),
        original_rank=rank,
        original_ties=0 if true is None else int((scores == scores[true]).sum()) - 1,
        forced=forced,
    )
