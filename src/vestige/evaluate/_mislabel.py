"""`vestige evaluate mislabel`: does self-influence find the examples with wrong labels?"""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Bool, Float

from vestige.data import Example, load_records
from vestige.errors import DataError, SpecError
from vestige.evaluate import (
    Evaluation,
    EvaluationRow,
    Line,
    Scored,
    Ties,
    Value,
    bootstrap,
    collect_scores,
    count_ties,
    line_figure,
    list_baselines,
    make_interval,
    rank_codes,
    recall_after,
    write_evaluation,
)
from vestige.methods import METHODS
from vestige.settings import MislabelSettings, with_settings

_TRUE, _FALSE = ("true", "yes", "1"), ("false", "no", "0", "none", "")
_CURVE = tuple(share / 100 for share in range(0, 101, 2))


@with_settings(MislabelSettings)
def mislabel(settings: MislabelSettings) -> Evaluation:
    """Measure how well self-influence finds wrong labels: area under the ROC curve, and recall by share inspected.

    In `settings.out`: `mislabel.json`, and the figure `mislabel`: found against inspected.

    Raises:
        SpecError: The data is missing, or a method's self-influence is the same for every example.
        DataError: The data has no such column, or no example is marked in it.
    """
    if settings.data is None:
        raise SpecError("Which labels are wrong is a column of the data. Type --data FILE, and --truth COLUMN.")
    for name in settings.methods:
        if constant := METHODS.find(name).constant_self_score:
            raise SpecError(
                f"Self-influence with {name} is {constant}, wrong or right. It would find nothing. "
                "Type --methods influence,grad-dot."
            )
    found = collect_scores(settings, "mislabel", self_influence=True)
    records = load_records(settings.data, **settings.reading)
    wrong = read_wrong_labels((example for example, _ in records), settings.truth)
    rows, lines, percent = [], [], [100 * share for share in _CURVE]
    for one in found.scored:
        scores = _self_influence(one, len(wrong))
        ties = count_ties(scores, wrong)
        area, precision = detection(ties)
        areas = resample_areas(scores, wrong, settings.draws, settings.seed)
        values: dict[str, Value] = {"AUC": make_interval(area, areas), "average precision": precision}
        found_at = recall_after(ties, [round(share * len(wrong)) for share in settings.inspected])
        values |= {f"found at {share:.0%}": value for share, value in zip(settings.inspected, found_at, strict=True)}
        rows.append(EvaluationRow.of(one, values))
        curve = recall_after(ties, [round(share * len(wrong)) for share in _CURVE])
        lines.append(Line(one.name, percent, [100 * each for each in curve]))
    others = [method.name for method in list_baselines() if not method.at_random]
    marked = int(np.count_nonzero(wrong))
    by_chance = {f"found at {share:.0%}": float(share) for share in settings.inspected}
    chance: dict[str, Value] = {"AUC": 0.5, "average precision": marked / len(wrong), **by_chance}
    result = Evaluation(
        "mislabel",
        f"{marked} of {len(wrong)} labels are wrong: found by self-influence, highest first",
        (*rows, EvaluationRow("random", chance, opponent=True)),
        (
            "Tied scores count at the expected value over every order of the tied; the random row is what chance "
            "gives.",
            f"Interval of the AUC: 95 %, {settings.draws} bootstrap draws of examples.",
            f"{', '.join(others[:-1])} and {others[-1]} have no self-influence that could rank examples, so they are "
            "not here.",
        ),
        {"examples": len(wrong), "wrong": marked},
    )
    lines.append(Line("random", percent, percent, opponent=True))
    figure = line_figure("mislabel", lines, "% of the data inspected", "% of the wrong labels found")
    return write_evaluation(result, settings.out, figure, settings.report_to)


def read_wrong_labels(examples: Iterable[Example], column: str) -> Bool[np.ndarray, "example"]:
    """Return the mask of the examples that are marked in a column of the data.

    Raises:
        DataError: The column is missing somewhere, holds something else than true or false, or marks none or all.
    """
    wrong = np.fromiter((_is_wrong(example, column) for example in examples), dtype=bool)
    if (marked := int(np.count_nonzero(wrong))) in (0, len(wrong)):
        raise DataError(
            f"The column {column!r} marks {marked} of {len(wrong)} examples as wrong, so there is nothing to "
            "distinguish."
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


def _self_influence(scored: Scored, examples: int) -> Float[np.ndarray, "example"]:
    name, constants = scored.run.run.method, {method.name: method.constant_self_score for method in METHODS}
    if constant := constants.get(name):
        raise SpecError(f"{scored.run.folder} is of {name}, whose self-influence is {constant}. Leave it out.")
    scores = scored.run.self_scores()
    known = int(np.count_nonzero(~np.isnan(scores)))
    if len(scores) != examples or known != examples:
        raise DataError(f"{scored.run.folder} scored {known} examples, and the data has {examples}.")
    return scores


def detection(ties: Ties) -> tuple[float, float]:
    """Return area under the ROC curve, and average precision, of scores that should be higher for the right ones.

    The area is the probability that a right example scores higher than another, a tie counting one half. Average
    precision is the sum of precision times the rise in recall, threshold by threshold, not the trapezoids under the
    curve, which are optimistic.

    Raises:
        DataError: All examples are right.
    """
    begins, sizes, hits, examples = ties
    reached = hits.cumsum()
    right, others = int(reached[-1]), examples - int(reached[-1])
    if not others:
        raise DataError("Every example is marked, so there is nothing to compare them with.")
    # Twice the others below, so that halves stay whole numbers.
    above, level = begins - (reached - hits), sizes - hits
    wins = int((hits * (2 * (others - above) - level)).sum())
    return wins / 2 / right / others, float((hits / right * (reached / (begins + sizes))).sum())


def resample_areas(
    scores: Float[np.ndarray, "example"], wrong: Bool[np.ndarray, "example"], draws: int, seed: int
) -> Float[np.ndarray, "draw"]:
    """Draw bootstrap areas; wrong and right examples are drawn apart, so that no draw lacks one of them."""
    values = np.unique(scores[wrong])
    codes = rank_codes(values, scores)
    own, others = codes[wrong] // 2, codes[~wrong]

    def compute(mine: np.ndarray, theirs: np.ndarray) -> float:
        counts = np.bincount(own[mine], minlength=len(values))
        # Of the drawn wrong ones, twice those below each code, those at it counting one half.
        beside = np.repeat(np.concatenate([[0], counts.cumsum()]), 2)
        losses = int((beside[1:] + beside[:-1])[others[theirs]].sum())
        return 1 - losses / 2 / len(own) / len(others)

    return bootstrap(compute, [len(own), len(others)], draws, seed)
