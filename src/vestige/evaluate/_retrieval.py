"""`vestige evaluate retrieval`: how soon do the examples come that are known to be right?

Ties count as their expected value over every order of the tied. All follows from a few counts: of each score that a
right example has, how many examples score higher and how many as high.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from vestige.data import Example, load_queries
from vestige.errors import DataError, SpecError
from vestige.evaluate import (
    Evaluation,
    EvaluationRow,
    Line,
    collect_scores,
    estimate_mean,
    line_figure,
    read_together,
    write_evaluation,
)
from vestige.settings import RetrievalSettings, with_settings


class Ties(NamedTuple):
    """Of each distinct score that a right example has, highest first."""

    begins: Int[np.ndarray, "value"]
    """Examples that score higher."""
    sizes: Int[np.ndarray, "value"]
    """Examples of this score."""
    hits: Int[np.ndarray, "value"]
    """Those of them that are right."""
    examples: int
    """Of the whole ranking."""


@with_settings(RetrievalSettings)
def retrieval(settings: RetrievalSettings) -> Evaluation:
    """Measure recall and mean reciprocal rank of the right examples, tied scores counted at their expected value.

    In `settings.out`: `retrieval.json`, and the figure `retrieval`.

    Raises:
        DataError: The queries have no such column, or it names examples that there are not.
    """
    if settings.queries is None:
        raise SpecError("The right examples are a column of the queries. Type --queries FILE, and --truth COLUMN.")
    found = collect_scores(settings, "retrieval")
    queries, examples, aligned = read_together(found.scored)
    given = load_queries(settings.queries, focus="read", on_bad_text=settings.on_bad_text)
    right = find_right_examples(given, settings.truth, queries, examples)
    lengths = sorted({min(k, len(examples)) for k in settings.k})
    columns = ["MRR", *(f"recall@{k}" for k in lengths)]
    rows, lines, tables = [], [], {}
    for one, scores in zip(found.scored, aligned, strict=True):
        ties = [count_ties(scores.of_query(query), wanted) for query, wanted in enumerate(right)]
        table = np.array([[reciprocal_rank(each), *recall_after(each, lengths)] for each in ties])
        means = [estimate_mean(column, settings.draws, settings.seed) for column in table.T]
        rows.append(EvaluationRow.of(one, dict(zip(columns, means, strict=True))))
        lines.append(Line(one.name, lengths, table[:, 1:].mean(0).tolist(), None, one.opponent))
        tables[one.name] = table.tolist()
    result = Evaluation(
        "retrieval",
        f"Right examples of {len(queries)} queries among {len(examples)}: recall and mean reciprocal rank",
        tuple(rows),
        (
            "Tied scores count at the expected value over every order of the tied, not by their position in the data.",
            f"Intervals: 95 %, {settings.draws} bootstrap draws of queries.",
            *found.notes,
        ),
        {
            "k": lengths,
            "right_per_query": float(np.mean([len(each) for each in right])),
            "per_query": tables,
            "columns": ["reciprocal_rank", *columns[1:]],
        },
    )
    figure = line_figure("retrieval", lines, "length of the list", "recall of the right examples")
    return write_evaluation(result, settings.out, figure, settings.report_to)


def find_right_examples(
    queries: Sequence[Example], column: str, query_ids: Sequence[str], example_ids: Iterable[str]
) -> list[Int[np.ndarray, "right"]]:
    """Return the ascending rows of each query's right examples, from a column of one id or a list of ids.

    Raises:
        DataError: The column is missing, empty, or names an example that there is not.
    """
    given = {query.id: query for query in queries}
    for name in query_ids:
        if name not in given:
            raise DataError(f"The scores are of a query {name!r} that the --queries do not hold.")
    named = [_read_ids(given[name], column) for name in query_ids]
    wanted = {one for names in named for one in names}
    # Only what is requested is looked up: a dictionary of all ids would be the largest object of the evaluation.
    place = {name: row for row, name in enumerate(example_ids) if name in wanted}
    for name, names in zip(query_ids, named, strict=True):
        if absent := [one for one in names if one not in place]:
            raise DataError(f"Query {name!r}: its {column} names {absent[0]!r}, which is no id of the training data.")
    return [np.unique([place[one] for one in names]) for names in named]


def _read_ids(query: Example, column: str) -> list[str]:
    # Columns that every example has are no longer among the further ones.
    own = {"id": query.id, "source": query.source, "label": query.label}
    value = own.get(column, query.extra.get(column))
    ids = [str(one) for one in value] if isinstance(value, list | tuple | np.ndarray) else [str(value)]
    if value is None or not ids:
        columns = ", ".join(sorted(query.extra)) or "no further columns"
        raise DataError(
            f"Query {query.id!r} has nothing in {column!r} (it has {columns}). Put the id of the right training "
            "example there, or a list of ids, and name the column with --truth."
        )
    return ids


def count_ties(
    scores: Float[np.ndarray, "example"], right: Bool[np.ndarray, "example"] | Int[np.ndarray, "right"]
) -> Ties:
    """Count the examples beside the right ones, which are given as a mask or as rows.

    Raises:
        DataError: No example is marked, or a score is not finite.
    """
    own = scores[right]
    if not len(own):
        raise DataError("No example is marked, so there is nothing to find.")
    if not np.isfinite(scores).all():
        raise DataError("Some scores are not finite numbers, so they do not rank.")
    values, hits = np.unique(own, return_counts=True)
    counts = np.bincount(rank_codes(values, scores), minlength=2 * len(values) + 1)
    above, sizes = counts[::-1].cumsum(), counts[1::2][::-1]
    return Ties(above[1::2] - sizes, sizes, hits[::-1], len(scores))


def rank_codes(values: Float[np.ndarray, "value"], scores: Float[np.ndarray, "example"]) -> Int[np.ndarray, "example"]:
    """Return each score's code among ascending distinct values: 2 j + 1 at value j, 2 j below it and above the last."""
    return np.searchsorted(values, scores, "left") + np.searchsorted(values, scores, "right")


def recall_after(ties: Ties, counts: Sequence[int]) -> list[float]:
    """Return the expected share of right examples in the first `counts` of the ranking, over all orders of ties."""
    begins, sizes, hits, _ = ties
    # Of a group that is cut, each order is equally likely, so each of its positions holds the same share of its hits.
    inside = (np.clip(count - begins, 0, sizes) for count in counts)
    return [float((hits * part / sizes).sum() / hits.sum()) for part in inside]


def reciprocal_rank(ties: Ties) -> float:
    """Return the expected value of 1 / rank of the first right example, over all orders of tied scores.

    In a group of n tied examples of which r are right, behind b others, the first right one has position j with
    probability C(n - j, r - 1) / C(n, r).
    """
    begin, size, among = (int(each[0]) for each in ties[:3])
    # Step by step from j = 1, for binomial coefficients of thousands would overflow.
    probability, total = among / size, 0.0
    for place in range(1, size - among + 2):
        total += probability / (begin + place)
        if place <= size - among:
            probability *= (size - among - place + 1) / (size - place)
    return total
