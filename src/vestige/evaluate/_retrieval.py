"""`vestige evaluate retrieval`: do scores find the examples that are known to be right?"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from vestige.data import Example, load_queries
from vestige.errors import DataError, SpecError
from vestige.evaluate._aligned import Aligned
from vestige.evaluate._figures import Line, line_figure
from vestige.evaluate._ranking_measures import TieCounter, Ties, found_after, reciprocal_rank
from vestige.evaluate._result import Evaluation, EvaluationRow, write_evaluation
from vestige.evaluate._scored import Scored, judged, together
from vestige.evaluate._statistics import mean_estimate
from vestige.settings import RetrievalSettings, verb


@verb(RetrievalSettings)
def retrieval(settings: RetrievalSettings) -> Evaluation:
    """Measure recall and mean reciprocal rank of the right examples, tied scores counted at their expected value.

    In `settings.out`: `retrieval.json`, and the figure `retrieval`.

    Raises:
        DataError: The queries have no such column, or it names examples that there are not.
    """
    if settings.queries is None:
        raise SpecError("The right examples are a column of the queries. Type --queries FILE, and --truth COLUMN.")
    found = judged(settings, "retrieval")
    queries, examples, aligned = together(found.scored)
    right = right_examples(
        load_queries(settings.queries, on_bad_text=settings.on_bad_text), settings.truth, queries, examples
    )
    lengths = sorted({min(k, len(examples)) for k in settings.k})
    tables = {
        one.name: _per_query(ties_of(scores, right), lengths) for one, scores in zip(found.scored, aligned, strict=True)
    }
    result = Evaluation(
        "retrieval",
        f"Right examples of {len(queries)} queries among {len(examples)}: recall and mean reciprocal rank",
        tuple(EvaluationRow.of(one, _values(tables[one.name], lengths, settings)) for one in found.scored),
        (
            "Tied scores count at the expected value over every order of the tied, not by their position in the data.",
            f"Intervals: 95 %, {settings.draws} bootstrap draws of queries.",
            *found.notes,
        ),
        {
            "k": lengths,
            "right_per_query": float(np.mean([len(each) for each in right])),
            "per_query": {name: table.tolist() for name, table in tables.items()},
            "columns": ["reciprocal_rank", *(f"recall@{k}" for k in lengths)],
        },
    )
    return write_evaluation(result, settings.out, _figure(found.scored, tables, lengths))


def right_examples(
    queries: list[Example], column: str, query_ids: list[str], example_ids: Iterable[str]
) -> list[Int[np.ndarray, "right"]]:
    """Return the ascending rows of each query's right examples, from a column of one id or a list of ids.

    Raises:
        DataError: The column is missing, empty, or names an example that there is not.
    """
    given = {query.id: query for query in queries}
    for name in query_ids:
        if name not in given:
            raise DataError(f"The scores are of a query {name!r} that the --queries do not hold.")
    named = [_ids(given[name], column) for name in query_ids]
    wanted = {one for names in named for one in names}
    # Only what is requested is looked up: a dictionary of all ids would be the largest object of the evaluation.
    place = {name: row for row, name in enumerate(example_ids) if name in wanted}
    for name, names in zip(query_ids, named, strict=True):
        if absent := [one for one in names if one not in place]:
            raise DataError(f"Query {name!r}: its {column} names {absent[0]!r}, which is no id of the training data.")
    return [np.unique([place[one] for one in names]) for names in named]


def _ids(query: Example, column: str) -> list[str]:
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


def ties_of(scores: Aligned, right: list[Int[np.ndarray, "right"]]) -> list[Ties]:
    """Count how the right examples of each query rank: one pass for their scores, and one to count the others.

    Raises:
        DataError: A score is not finite.
    """
    own: list[list[np.ndarray]] = [[] for _ in right]
    for places, block in scores.blocks():
        rows = np.arange(places.start, places.stop) if isinstance(places, slice) else places
        for query, wanted in enumerate(right):
            own[query].append(block[query, np.isin(rows, wanted)])
    counters = [TieCounter(np.concatenate(parts)) for parts in own]
    for _, block in scores.blocks():
        for counter, part in zip(counters, block, strict=True):
            counter.add(part)
    return [counter.ties() for counter in counters]


def _per_query(ties: list[Ties], lengths: list[int]) -> Float[np.ndarray, "query measure"]:
    """Return the reciprocal rank, then recall at each length."""
    return np.array([[reciprocal_rank(each), *found_after(each, lengths)] for each in ties])


def _values(table: np.ndarray, lengths: list[int], settings: RetrievalSettings) -> dict[str, Any]:
    names = ["MRR", *(f"recall@{k}" for k in lengths)]
    return {name: mean_estimate(table[:, column], settings.draws, settings.seed) for column, name in enumerate(names)}


def _figure(scored: tuple[Scored, ...], tables: dict[str, np.ndarray], lengths: list[int]) -> dict[str, bytes]:
    lines = [Line(one.name, lengths, tables[one.name][:, 1:].mean(0).tolist(), None, one.opponent) for one in scored]
    return line_figure("retrieval", lines, "length of the list", "recall of the right examples")
