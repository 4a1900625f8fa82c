"""`vestige evaluate mislabel`: does self-influence find the examples with wrong labels?"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from vestige.data import Example, load_records
from vestige.errors import DataError, SpecError
from vestige.evaluate._figures import Line, line_figure
from vestige.evaluate._ranking_measures import detection, found_after, resampled_areas, tied
from vestige.evaluate._result import Evaluation, EvaluationRow, Value, write_evaluation
from vestige.evaluate._scored import Scored, judged
from vestige.evaluate._statistics import interval
from vestige.settings import MislabelSettings, verb

_TRUE, _FALSE = ("true", "yes", "1"), ("false", "no", "0", "none", "")
_CURVE = tuple(share / 100 for share in range(0, 101, 2))


@verb(MislabelSettings)
def mislabel(settings: MislabelSettings) -> Evaluation:
    """Measure how well self-influence finds wrong labels: area under the ROC curve, and recall by share inspected.

    In `settings.out`: `mislabel.json`, and the figure `mislabel`: found against inspected.

    Raises:
        SpecError: The data is missing, or a method's self-influence is the same for every example.
        DataError: The data has no such column, or no example is marked in it.
    """
    if settings.data is None:
        raise SpecError("Which labels are wrong is a column of the data. Type --data FILE, and --truth COLUMN.")
    _refuse_cosines(settings)
    found = judged(settings, "mislabel", self_influence=True)
    wrong = wrong_labels(
        (example for example, _ in load_records(settings.data, limit=settings.limit, on_bad_text=settings.on_bad_text)),
        settings.truth,
    )
    judgements = [_judgement(one, wrong, settings) for one in found.scored]
    rows = [EvaluationRow.of(one, each.values) for one, each in zip(found.scored, judgements, strict=True)]
    marked = int(np.count_nonzero(wrong))
    by_chance = {f"found at {share:.0%}": float(share) for share in settings.inspected}
    chance = EvaluationRow("random", {"AUC": 0.5, "average precision": marked / len(wrong), **by_chance}, opponent=True)
    result = Evaluation(
        "mislabel",
        f"{marked} of {len(wrong)} labels are wrong: found by self-influence, highest first",
        (*rows, chance),
        (
            "Tied scores count at the expected value over every order of the tied; the random row is what chance "
            "gives.",
            f"Interval of the AUC: 95 %, {settings.draws} bootstrap draws of examples.",
            "bm25, rep-sim and grad-cos have no self-influence that could rank examples, so they are not here.",
        ),
        {"examples": len(wrong), "wrong": marked},
    )
    percent = [100 * share for share in _CURVE]
    lines = [Line(one.name, percent, each.curve) for one, each in zip(found.scored, judgements, strict=True)]
    lines.append(Line("random", percent, percent, opponent=True))
    figure = line_figure("mislabel", lines, "% of the data inspected", "% of the wrong labels found")
    return write_evaluation(result, settings.out, figure)


def wrong_labels(examples: Iterable[Example], column: str) -> Bool[np.ndarray, "example"]:
    """Return the examples that are marked in a column of the data, as a mask.

    Raises:
        DataError: The column is missing somewhere, holds something else than true or false, or marks none or all.
    """
    wrong = np.fromiter((_is_wrong(example, column) for example in examples), dtype=bool)
    count, marked = len(wrong), int(np.count_nonzero(wrong))
    if marked in (0, count):
        raise DataError(
            f"The column {column!r} marks {marked} of {count} examples as wrong, so there is nothing to distinguish."
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
    scores = scored.run.self_scores()
    known = int(np.count_nonzero(~np.isnan(scores)))
    if len(scores) != examples or known != examples:
        raise DataError(f"{scored.run.folder} scored {known} examples, and the data has {examples}.")
    return scores


class _Judgement(NamedTuple):
    values: dict[str, Value]
    curve: list[float]
    """Percent of the wrong labels found, for each of `_CURVE`."""


def _judgement(scored: Scored, wrong: Bool[np.ndarray, "example"], settings: MislabelSettings) -> _Judgement:
    scores = _self_influence(scored, len(wrong))
    ties = tied(scores, wrong)
    area, precision = detection(ties)
    areas = resampled_areas(scores, wrong, settings.draws, settings.seed)
    found = found_after(ties, [round(share * len(wrong)) for share in settings.inspected])
    curve = found_after(ties, [round(share * len(wrong)) for share in _CURVE])
    values: dict[str, Value] = {"AUC": interval(area, areas), "average precision": precision}
    values |= {f"found at {share:.0%}": value for share, value in zip(settings.inspected, found, strict=True)}
    return _Judgement(values, [100 * each for each in curve])
