"""`vestige evaluate retrieval`: do scores find the examples that are known to be right?"""

from typing import Any

import numpy as np
from jaxtyping import Bool

from vestige.data import Example, load_queries
from vestige.errors import DataError, SpecError
from vestige.evaluate._figures import Line, line_figure
from vestige.evaluate._ranking_measures import recall, reciprocal_rank
from vestige.evaluate._result import Evaluation, EvaluationRow, write_evaluation
from vestige.evaluate._scored import Scored, judged, same_axes
from vestige.evaluate._statistics import mean_estimate
from vestige.settings import RetrievalSettings, verb


@verb(RetrievalSettings)
def retrieval(settings: RetrievalSettings) -> Evaluation:
    """Recall and mean reciprocal rank of the right examples, tied scores counted at their expected value.

    In `settings.out`: `retrieval.json`, and the figure `retrieval`.

    Raises:
        DataError: The queries have no such column, or it names examples that there are not.
    """
    if settings.queries is None:
        raise SpecError("The right examples are a column of the queries. Type --queries FILE, and --truth COLUMN.")
    found = judged(settings)
    queries, examples = same_axes(found.scored)
    right = right_examples(load_queries(settings.queries), settings.truth, queries, examples)
    lengths = sorted({min(k, len(examples)) for k in settings.k})
    tables = {one.name: _per_query(one.scores_for(queries, examples), right, lengths) for one in found.scored}
    result = Evaluation(
        "retrieval",
        f"Right examples of {len(queries)} queries among {len(examples)}: recall and mean reciprocal rank",
        tuple(EvaluationRow.of(one, _values(tables[one.name], lengths, settings)) for one in found.scored),
        (
            "Tied scores count at the expected value over every order of the tied, never by their place in the data.",
            f"Intervals: 95 %, {settings.draws} bootstrap draws of queries.",
            *found.notes,
        ),
        {
            "k": lengths,
            "right_per_query": float(right.sum(1).mean()),
            "per_query": {name: table.tolist() for name, table in tables.items()},
            "columns": ["reciprocal_rank", *(f"recall@{k}" for k in lengths)],
        },
    )
    return write_evaluation(result, settings.out, _figure(found.scored, tables, lengths))


def right_examples(
    queries: list[Example], column: str, query_ids: list[str], example_ids: list[str]
) -> Bool[np.ndarray, "query example"]:
    """Which examples are right for which query, from a column that holds one id or a list of ids.

    Raises:
        DataError: The column is missing, empty, or names an example that there is not.
    """
    given = {query.id: query for query in queries}
    place = {name: number for number, name in enumerate(example_ids)}
    right = np.zeros((len(query_ids), len(example_ids)), dtype=bool)
    for row, name in enumerate(query_ids):
        if name not in given:
            raise DataError(f"The scores are of a query {name!r} that the --queries do not hold.")
        for one in _ids(given[name], column):
            if one not in place:
                raise DataError(f"Query {name!r}: its {column} names {one!r}, which is no id of the training data.")
            right[row, place[one]] = True
    return right


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


def _per_query(scores: np.ndarray, right: np.ndarray, lengths: list[int]) -> np.ndarray:
    """[query, measure]: reciprocal rank, then recall at each length."""
    return np.array(
        [
            [reciprocal_rank(row, wanted), *(recall(row, wanted, k) for k in lengths)]
            for row, wanted in zip(scores, right, strict=True)
        ]
    )


def _values(table: np.ndarray, lengths: list[int], settings: RetrievalSettings) -> dict[str, Any]:
    names = ["MRR", *(f"recall@{k}" for k in lengths)]
    return {name: mean_estimate(table[:, column], settings.draws, settings.seed) for column, name in enumerate(names)}


def _figure(scored: tuple[Scored, ...], tables: dict[str, np.ndarray], lengths: list[int]) -> dict[str, bytes]:
    lines = [Line(one.name, lengths, tables[one.name][:, 1:].mean(0).tolist(), None, one.opponent) for one in scored]
    return line_figure("retrieval", lines, "length of the list", "recall of the right examples")
