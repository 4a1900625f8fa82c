"""`vestige data candidates`: for every query the training examples that its original could be, judging by words."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
from jaxtyping import Float

from vestige.data import Bm25Variant, Example, LexicalIndex, load_examples, load_queries, prompt_of, words_of
from vestige.errors import DataError
from vestige.prepare import Prepared, check_same_result, claim_result, fingerprint_of, row_of, write_prepared
from vestige.progress import announce
from vestige.settings import with_settings
from vestige.storage import write_durably
from vestige.terminal import shorten
from vestige_recipes.commands import CandidatesSettings

KIND, TABLE = "candidates", "candidates.parquet"
_COLUMNS = ("query_id", "rank", "example_id", "row", "score", "original")
_TYPES = (pa.string(), pa.int64(), pa.string(), pa.int64(), pa.float64(), pa.bool_())
_SCHEMA = pa.schema(list(zip(_COLUMNS, _TYPES, strict=True)))
_ROWS_AT_ONCE = 2**16
BLOCK_SCORES = 2**22
"""Scores held at once, over all training examples."""


class Candidate(NamedTuple):
    """A training example among the candidates of a query."""

    row: int
    id: str
    score: float
    """BM25 of its prompt with the query's."""


class Candidates(NamedTuple):
    """The candidates of a query, best first."""

    query: str
    listed: tuple[Candidate, ...]
    left_out_ties: int
    """Training examples that are not listed though they score as much as the last one listed (before forcing)."""
    original: Candidate | None
    """The example that the query was made from, of several the one that ranks first; None where it is not known."""
    original_rank: int | None
    """Its rank among all training examples, from 1; examples of equal score rank in the order of the data."""
    original_ties: int
    forced: bool
    """Whether it took the last place because it had not earned one."""

    def columns(self) -> dict[str, Any]:
        """Return what the query's row of data.jsonl has beside its own columns."""
        listed = [each.id for each in self.listed]
        found: dict[str, Any] = {"candidates": listed, "left_out_ties": self.left_out_ties, "forced": self.forced}
        if self.original is not None:
            found |= {"original_rank": self.original_rank, "original_ties": self.original_ties}
        return found


@with_settings(CandidatesSettings)
def candidates(settings: CandidatesSettings) -> Prepared:
    """Write the queries with the ids of their `candidates`, best first, and where BM25 ranks the true original.

    Each row of data.jsonl is a query with `candidates`, `original_rank`, `original_ties`, `left_out_ties` and `forced`;
    `vestige evaluate components --candidates given` takes it as its `--queries`. candidates.parquet has a line for each
    pair, with its score.

    Raises:
        DataError: Data or queries are absent or broken, no prompt has a word, or an original is not in the data.
    """
    training = load_examples(settings.data, on_bad_text=settings.on_bad_text)
    queries = load_queries(settings.queries, on_bad_text=settings.on_bad_text)
    if settings.limit is not None and settings.limit < len(queries):
        announce(f"Only the first {settings.limit:,} of {len(queries):,} queries are used (limit={settings.limit}).")
    queries = queries[: settings.limit]
    if not queries:
        raise DataError(f"{settings.queries} has no rows. Give the queries, such as the data.jsonl of a paraphrase.")
    default = CandidatesSettings.model_fields["truth"].default
    if settings.truth != default and not any(settings.truth in query.extra for query in queries):
        there = shorten(", ".join(sorted({name for query in queries for name in query.extra})) or "none", 200)
        raise DataError(
            f"--truth {settings.truth}: no query has this column. There are: {there}. Name another, or leave it out."
        )
    fingerprint = hashlib.sha256(f"{fingerprint_of(training)}:{fingerprint_of(queries)}".encode()).hexdigest()
    check_same_result(settings, KIND, fingerprint, frozenset())
    found = find_candidates(
        queries,
        training,
        k=settings.count,
        force_original=settings.include_original,
        variant=settings.variant,
        truth=settings.truth,
    )
    nameless = [one.query for one in found if one.original is None]
    if settings.include_original and nameless:
        raise DataError(
            f"--include-original: {len(nameless):,} of {len(found):,} queries name no original, "
            f"such as {nameless[0]!r}. Name the column that holds its id with --truth."
        )
    claim_result(settings, KIND, fingerprint)
    write_durably(settings.out / TABLE, [_table(found)])
    rows = [row_of(query) | one.columns() for query, one in zip(queries, found, strict=True)]
    ranks = Counter(one.original_rank for one in found if one.original_rank is not None)
    details = {"training": len(training), "rank_of_original": {str(rank): ranks[rank] for rank in sorted(ranks)}}
    notes = _notes(found, len(training), settings)
    return write_prepared(settings, KIND, rows, fingerprint=fingerprint, details=details, notes=notes)


def _table(found: Sequence[Candidates]) -> memoryview:
    """Return the file with a line for each pair, of which a block at a time is held as Python values."""
    lines = (
        (one.query, rank, each.id, each.row, each.score, one.original is not None and each.row == one.original.row)
        for one in found
        for rank, each in enumerate(one.listed, 1)
    )
    sink = pa.BufferOutputStream()
    with parquet.ParquetWriter(sink, _SCHEMA) as writer:
        while block := list(islice(lines, _ROWS_AT_ONCE)):
            writer.write_table(pa.table(list(zip(*block, strict=True)), schema=_SCHEMA))
    return memoryview(sink.getvalue())


def _notes(found: Sequence[Candidates], training: int, settings: CandidatesSettings) -> list[str]:
    count = training if settings.count is None else min(settings.count, training)
    notes = [f"{count:,} candidates of {training:,} for each of {len(found):,} queries, by BM25 ({settings.variant})."]
    known = [one for one in found if one.original_rank is not None]
    if known:
        listed = sum((one.original_rank or 0) <= count for one in known)
        first = sum(one.original_rank == 1 for one in known)
        notes.append(
            f"The original comes first for {first / len(known):.1%} and is listed by its score for "
            f"{listed / len(known):.1%} of the {len(known):,} queries that name one."
        )
    if put := sum(one.forced for one in found):
        notes.append(f"For {put:,} it was put in the last place without having earned it (--include-original).")
    if len(known) < len(found):
        notes.append(f"{len(found) - len(known):,} queries name no original in {settings.truth!r}.")
    if cut := sum(one.left_out_ties > 0 for one in found):
        notes.append(f"For {cut:,} examples are left out that score as much as the last one listed.")
    return notes


def find_candidates(
    queries: Sequence[Example],
    training: Sequence[Example],
    *,
    k: int | None = 5,
    force_original: bool = False,
    words: Callable[[str], list[str]] | None = None,
    variant: Bm25Variant = "okapi",
    truth: str = "original_id",
) -> list[Candidates]:
    """Return for every query the k training examples with the most similar prompts, and where its original ranks.

    Similarity is BM25 between prompts, as `LexicalIndex` defines it. The original takes part like any other example. It
    gets a place that it has not earned only with `force_original`, and `forced` says so: candidates that always hold
    the truth make every accuracy look better.

    Args:
        queries: Prompts, such as paraphrases or a model's answers to them.
        training: What to choose from.
        k: Candidates of each query; None is all of the training data.
        force_original: Put the original into the last place when it is not listed (what the published study does).
        words: From a prompt to its words. Not given: of Okapi's form what stands between blanks, as published; of
            Lucene's runs of letters and digits, case-folded, as the method `bm25` has it.
        variant: The form of BM25.
        truth: Column of the queries that holds the id of the original, or several; of a query that has none, the
            original is the training example with its own id, if there is one.

    Returns:
        One entry for each query, in their order. Examples of equal score are in the order of the training data.

    Raises:
        DataError: k is below 1, no training prompt has a word, or an original is not in the training data.
    """
    if k is not None and k < 1:
        raise DataError(f"k={k}: give a number of candidates above 0, or None for all of the training data.")
    words = words or (str.split if variant == "okapi" else words_of)
    row_by_id = {example.id: row for row, example in enumerate(training)}
    truths = [_originals(query, row_by_id, truth) for query in queries]
    asked = [words(prompt_of(query)) for query in queries]
    index = LexicalIndex(asked, (words(prompt_of(example)) for example in training), variant)
    return [
        _choose(query.id, scores, training, len(training) if k is None else k, rows, force_original)
        for query, rows, scores in zip(queries, truths, _by_query(index, len(queries)), strict=True)
    ]


def okapi_scores(
    queries: Sequence[Sequence[str]], documents: Sequence[Sequence[str]]
) -> Iterator[Float[np.ndarray, "document"]]:
    """Yield BM25 in Okapi's form of each query with every document, float64, one query after the other.

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


def _originals(query: Example, row_by_id: Mapping[str, int], truth: str) -> list[int]:
    """Return the rows of the training examples that the query was made from."""
    given: Any = query.extra.get(truth)
    if given is None:
        return [row_by_id[query.id]] if query.id in row_by_id else []
    names = given if isinstance(given, list | tuple | np.ndarray) else [given]
    for name in map(str, names):
        if name not in row_by_id:
            raise DataError(
                f"Query {query.id!r} was made from the training example {name!r}, which is not in the training data. "
                "Give the data that the queries were made from."
            )
    return [row_by_id[str(name)] for name in names]


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
