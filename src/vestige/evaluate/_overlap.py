"""`vestige evaluate overlap`: do different queries, and different methods, name different examples?"""

from typing import Any

import numpy as np

from vestige.errors import UserError
from vestige.evaluate._figures import matrix_figure
from vestige.evaluate._overlap_measures import Tops, between_queries, by_chance, cardinality, hub, jaccard
from vestige.evaluate._result import Evaluation, EvaluationRow, write_evaluation
from vestige.evaluate._scored import Scored, judged
from vestige.evaluate._statistics import known_mean
from vestige.settings import OverlapSettings, verb


@verb(OverlapSettings)
def overlap(settings: OverlapSettings) -> Evaluation:
    """Measure the overlap of top lists between queries and between methods, and find the example that is in most lists.

    Reads the ranked lists of runs, so it needs no dense scores. In `settings.out`: `overlap.json`, and the figure
    `overlap`, a matrix of methods.

    Raises:
        UserError: A run keeps shorter lists, or runs are of different queries.
    """
    found = judged(settings, "overlap")
    _require_same(found.scored)
    tops = {one.name: _tops(one, settings.k) for one in found.scored}
    examples = found.scored[0].run.run.data.examples
    names = list(tops)
    between = np.array([[_agreement(tops[one], tops[other]) for other in names] for one in names])
    chance = by_chance(settings.k, examples)
    result = Evaluation(
        "overlap",
        f"Top {settings.k} of {len(tops[names[0]])} queries among {examples} examples",
        tuple(EvaluationRow.of(one, _values(one, tops[one.name])) for one in found.scored),
        (
            f"Overlap is the Jaccard index of two lists; two random lists would reach about {chance:.3f}.",
            "Different examples: those named at all over positions in the lists, 1 where no two queries share one.",
            *found.notes,
        ),
        {"k": settings.k, "by_chance": chance, "methods": names, "between_methods": between.tolist()},
    )
    figure = matrix_figure("overlap", names, between, f"Jaccard index of the top {settings.k}, mean over queries")
    return write_evaluation(result, settings.out, figure)


def _tops(scored: Scored, k: int) -> Tops:
    """Return the rows of the first `k` examples of each query.

    Raises:
        UserError: The run keeps fewer.
    """
    run = scored.run
    wanted = min(k, run.run.data.examples)
    tops = [[row.row for row in run.top(name, wanted)] for name in run.queries]
    if any(len(top) < wanted for top in tops):
        raise UserError(
            f"{run.folder} keeps {min(map(len, tops))} examples of each query, and {wanted} were requested. Give a "
            f"smaller --k, or make the run again with --k {wanted}."
        )
    return tops


def _require_same(scored: tuple[Scored, ...]) -> None:
    first = scored[0].run
    for other in scored[1:]:
        same = other.run.queries == first.queries and other.run.run.data.examples == first.run.data.examples
        if not same:
            raise UserError(
                f"{first.folder} and {other.run.folder} are of different queries or data, so their lists cannot be "
                "compared. Judge them one by one."
            )


def _values(scored: Scored, tops: Tops) -> dict[str, Any]:
    found = hub(tops)
    name = next(
        row.example_id
        for query in scored.run.queries
        for row in scored.run.top(query, len(tops[0]))
        if row.row == found.row
    )
    return {
        "overlap of queries": between_queries(tops),
        "different examples": cardinality(tops),
        "hub rate": found.rate,
        "hub": name,
    }


def _agreement(one: Tops, other: Tops) -> float:
    return known_mean(np.array([jaccard(first, second) for first, second in zip(one, other, strict=True)]))
