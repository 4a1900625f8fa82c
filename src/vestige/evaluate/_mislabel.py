"""`vestige evaluate mislabel`: does self-influence find the examples with wrong labels?"""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from vestige.data import Example, load_examples
from vestige.errors import DataError, SpecError
from vestige.evaluate._figures import Line, line_figure
from vestige.evaluate._ranking_measures import area_under_curve, detection, found_after
from vestige.evaluate._result import Evaluation, EvaluationRow, write_evaluation
from vestige.evaluate._scored import Scored, judged
from vestige.evaluate._statistics import Estimate, interval
from vestige.settings import MislabelSettings, verb

_TRUE, _FALSE = ("true", "yes", "1"), ("false", "no", "0", "none", "")
_CURVE = tuple(share / 100 for share in range(0, 101, 2))


@verb(MislabelSettings)
def mislabel(settings: MislabelSettings) -> Evaluation:
    """Area under the ROC curve of self-influence for wrong labels, and the share found after reading some of the data.

    In `settings.out`: `mislabel.json`, and the figure `mislabel`: found against inspected.

    Raises:
        SpecError: The data is missing, or a method's self-influence is the same for every example.
        DataError: The data has no such column, or no example is marked in it.
    """
    if settings.data is None:
        raise SpecError("Which labels are wrong is a column of the data. Type --data FILE, and --truth COLUMN.")
    _refuse_cosines(settings)
    found = judged(settings, self_influence=True)
    wrong = wrong_labels(load_examples(settings.data, limit=settings.limit), settings.truth)
    scores = {one.name: _self_influence(one, len(wrong)) for one in found.scored}
    rows = [EvaluationRow.of(one, _values(scores[one.name], wrong, settings)) for one in found.scored]
    by_chance = {f"found at {share:.0%}": float(share) for share in settings.inspected}
    chance = EvaluationRow("random", {"AUC": 0.5, "average precision": float(wrong.mean()), **by_chance}, opponent=True)
    result = Evaluation(
        "mislabel",
        f"{int(wrong.sum())} of {len(wrong)} labels are wrong: found by self-influence, highest first",
        (*rows, chance),
        (
            "Tied scores count at the expected value over every order of the tied; the random row is what chance "
            "gives.",
            f"Interval of the AUC: 95 %, {settings.draws} bootstrap draws of examples.",
            "bm25, rep-sim and grad-cos have no self-influence that could rank examples, so they are not here.",
        ),
        {"examples": len(wrong), "wrong": int(wrong.sum())},
    )
    counts = [round(share * len(wrong)) for share in _CURVE]
    percent = [100 * share for share in _CURVE]
    lines = [
        Line(name, percent, [100 * one for one in found_after(each, wrong, counts)]) for name, each in scores.items()
    ]
    lines.append(Line("random", percent, percent, opponent=True))
    figure = line_figure("mislabel", lines, "% of the data inspected", "% of the wrong labels found")
    return write_evaluation(result, settings.out, figure)


def wrong_labels(examples: list[Example], column: str) -> Bool[np.ndarray, "example"]:
    """Which examples are marked in a column of the data.

    Raises:
        DataError: The column is missing somewhere, holds something else than true or false, or marks none or all.
    """
    wrong = np.array([_is_wrong(example, column) for example in examples])
    if wrong.all() or not wrong.any():
        raise DataError(
            f"The column {column!r} marks {int(wrong.sum())} of {len(wrong)} examples as wrong, so there is nothing to "
            "tell apart."
        )
    return wrong


def _is_wrong(example: Example, column: str) -> bool:
    if column not in example.extra:
        columns = ", ".join(sorted(example.extra)) or "no further columns"
        raise DataError(
            f"Example {example.id!r} has no column {column!r} (it has {columns}). Mark wrong labels with true and "
            "right ones with false, and name the column with --truth."
        )
    word = str(example.extra[column]).strip().lower()
    if word not in _TRUE + _FALSE:
        raise DataError(f"Example {example.id!r}: {column} is {word!r}, expected true or false.")
    return word in _TRUE


def _refuse_cosines(settings: MislabelSettings) -> None:
    if "grad-cos" in settings.methods:
        raise SpecError(
            "Self-influence with grad-cos is the cosine of a gradient with itself: 1 for every example, wrong or "
            "right. It would find nothing. Type --methods influence,grad-dot."
        )


def _self_influence(scored: Scored, examples: int) -> Float[np.ndarray, "example"]:
    if scored.run.run.method == "grad-cos":
        raise SpecError(
            f"{scored.run.folder} is of grad-cos, whose self-influence is 1 for every example. Leave it out."
        )
    rows = scored.run.self_influence()
    if len(rows) != examples:
        raise DataError(f"{scored.run.folder} scored {len(rows)} examples, and the data has {examples}.")
    scores = np.zeros(examples)
    scores[[row.row for row in rows]] = [row.score for row in rows]
    return scores


def _values(scores: np.ndarray, wrong: np.ndarray, settings: MislabelSettings) -> dict[str, Any]:
    area, precision = detection(scores, wrong)
    found = found_after(scores, wrong, [round(share * len(wrong)) for share in settings.inspected])
    return {
        "AUC": _interval(area, scores, wrong, settings),
        "average precision": precision,
        **{f"found at {share:.0%}": value for share, value in zip(settings.inspected, found, strict=True)},
    }


def _interval(area: float, scores: np.ndarray, wrong: np.ndarray, settings: MislabelSettings) -> Estimate:
    """Wrong and right examples are drawn apart, so that no draw lacks one of them."""
    random, sides = np.random.default_rng(settings.seed), (scores[wrong], scores[~wrong])
    draws = [area_under_curve(*(random.choice(side, len(side)) for side in sides)) for _ in range(settings.draws)]
    return interval(area, np.array(draws))
