"""`vestige evaluate overlap`: do different queries, and different methods, name different examples?"""

from collections.abc import Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from vestige.errors import UserError
from vestige.evaluate import (
    Evaluation,
    EvaluationRow,
    Scored,
    Value,
    collect_scores,
    matrix_figure,
    mean_of_known,
    pearson,
    read_together,
    spearman,
    write_evaluation,
)
from vestige.settings import OverlapSettings, with_settings

Tops = Sequence[Sequence[int]]
"""Rows of the first examples of each query."""


class ListOverlap(NamedTuple):
    """What the top lists of the queries have in common."""

    queries: float
    """Mean Jaccard index of the lists of two queries; NaN for a single query."""
    cardinality: float
    """Distinct examples over filled positions: 1 where no two queries share an example."""
    hub: int
    """The example that is in most lists; the first of several."""
    hub_rate: float
    """Share of the queries in whose lists it is."""


@with_settings(OverlapSettings)
def overlap(settings: OverlapSettings) -> Evaluation:
    """Measure the overlap of top lists between queries and between methods, and find the example that is in most lists.

    Reads the ranked lists of runs; of those with dense scores also the correlations of all scores, two by two. In
    `settings.out`: `overlap.json`, and the figure `overlap`, a matrix of methods.

    Raises:
        UserError: A run keeps shorter lists, or runs are of different queries.
    """
    found = collect_scores(settings, "overlap")
    first = found.scored[0].run
    for other in found.scored[1:]:
        if (other.run.run.queries, other.run.run.data.examples) != (first.run.queries, first.run.data.examples):
            raise UserError(
                f"{first.folder} and {other.run.folder} are of different queries or data, so their lists cannot be "
                "compared. Judge them one by one."
            )
    tops, examples = {one.name: _read_tops(one, settings.k) for one in found.scored}, first.run.data.examples
    names, correlations = list(tops), _correlate(found.scored)
    between = np.array([[jaccard(tops[one], tops[other]) for other in names] for one in names])
    chance = overlap_by_chance(settings.k, examples)
    result = Evaluation(
        "overlap",
        f"Top {settings.k} of {len(tops[names[0]])} queries among {examples} examples",
        tuple(EvaluationRow.of(one, _values(one, tops[one.name])) for one in found.scored),
        (
            f"Overlap is the Jaccard index of two lists; two random lists would reach about {chance:.3f}.",
            *map(_describe_correlation, correlations),
            "Different examples: those named at all over positions in the lists, 1 where no two queries share one.",
            *found.notes,
        ),
        {
            "k": settings.k,
            "by_chance": chance,
            "methods": names,
            "between_methods": between.tolist(),
            "correlations": correlations,
        },
    )
    figure = matrix_figure("overlap", names, between, f"Jaccard index of the top {settings.k}, mean over queries")
    return write_evaluation(result, settings.out, figure, settings.report_to)


def _correlate(scored: Sequence[Scored]) -> list[dict[str, Any]]:
    """Return correlations over all examples of every two runs with all scores, baselines aside; mean over queries."""
    found, dense = [], [one for one in scored if one.run.has_dense and not one.opponent]
    for one, other in combinations(dense, 2):
        try:
            queries, _, tables = read_together([one, other])
        except UserError:  # under other ids, where ranked lists can be compared by row
            continue
        pairs = [[table.of_query(query)[:, None] for table in tables] for query in range(len(queries))]
        values = {f.__name__: mean_of_known(np.concatenate([f(*pair) for pair in pairs])) for f in (pearson, spearman)}
        found.append({"methods": [one.name, other.name], **values})
    return found


def _describe_correlation(found: dict[str, Any]) -> str:
    pair, values = " and ".join(found["methods"]), (found["pearson"], found["spearman"])
    words = ["undefined" if np.isnan(value) else f"{value:.3f}" for value in values]
    return f"All scores of {pair}: Pearson {words[0]}, Spearman {words[1]}, mean over queries."


def _read_tops(scored: Scored, k: int) -> Tops:
    """Return the rows of the first `k` examples of each query."""
    run = scored.run
    wanted = min(k, run.run.data.examples)
    tops = [[row.row for row in run.top(name, wanted)] for name in run.queries]
    if any(len(top) < wanted for top in tops):
        raise UserError(
            f"{run.folder} keeps {min(map(len, tops))} examples of each query, and {wanted} were requested. Give a "
            f"smaller --k, or make the run again with --k {wanted}."
        )
    return tops


def _values(scored: Scored, tops: Tops) -> dict[str, Value]:
    found, run = measure_overlap(tops), scored.run
    rows = (row for query in run.queries for row in run.top(query, len(tops[0])))
    return {
        "overlap of queries": found.queries,
        "different examples": found.cardinality,
        "hub rate": found.hub_rate,
        "hub": next(row.example_id for row in rows if row.row == found.hub),
    }


def jaccard(first: Tops, second: Tops) -> float:
    """Return shared examples over all examples of two lists, mean over pairs; NaN where all lists are empty."""
    pairs = [(set(one), set(other)) for one, other in zip(first, second, strict=True)]
    return mean_of_known(np.array([len(a & b) / len(a | b) if a | b else np.nan for a, b in pairs], dtype=np.float64))


def measure_overlap(tops: Tops) -> ListOverlap:
    """Return what the lists of all queries have in common."""
    one, other = ([pair[side] for pair in combinations(tops, 2)] for side in (0, 1))
    counts = np.bincount(np.concatenate([np.asarray(sorted(set(top)), dtype=np.int64) for top in tops]))
    distinct = len({row for top in tops for row in top}) / sum(len(top) for top in tops)
    return ListOverlap(jaccard(one, other), distinct, int(counts.argmax()), float(counts.max()) / len(tops))


def overlap_by_chance(k: int, examples: int) -> float:
    """Estimate the Jaccard index of two random lists: k^2 / n shared examples of 2 k - k^2 / n."""
    k = min(k, examples)
    shared = k * k / examples
    return shared / (2 * k - shared)
