"""What was kept out of a selection for a reason: harmful examples, and near copies of chosen ones."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vestige.selection._scores import ScoreSource
from vestige.selection._store import Choice
from vestige.settings import SelectSettings

Reasons = dict[int, dict[str, Any]]
"""By row of the data: the columns `problem`, `score`, `copy_of` and `cosine`, as far as they apply."""


def removed_rows(
    settings: SelectSettings,
    scores: ScoreSource | None,
    targets: Mapping[str, Sequence[int]],
    ids: Sequence[str],
    choices: Sequence[Choice],
) -> Reasons:
    """Return rows below `min_score` by the strategy's score, and those whose gradients repeat a chosen one's.

    What merely did not fit into the budget is not among them. Of a run that keeps only the ends of its rankings,
    examples in between are not reported.
    """
    found: Reasons = {}
    if settings.min_score is not None and scores is not None and scores.complete:
        values = scores.best(_groups(settings, scores, targets)).score
        # NaN is not below anything: what has no score is reported in a note.
        for row in np.flatnonzero(values < settings.min_score).tolist():
            problem = f"score below {settings.min_score:g}"
            found[row] = {"problem": problem, "score": float(values[row])}
    row_of = {name: row for row, name in enumerate(ids)} if any(choice.replaces for choice in choices) else {}
    for choice in choices:
        for name, cosine in zip(choice.replaces, choice.cosines, strict=True):
            found[row_of[name]] = {"problem": "near copy", "copy_of": choice.example_id, "cosine": cosine}
    return found


def _groups(
    settings: SelectSettings, scores: ScoreSource, targets: Mapping[str, Sequence[int]]
) -> Sequence[Sequence[int]]:
    """Return the queries over whose mean a strategy judges an example; the best of several such means decides."""
    if settings.strategy == "per-target":
        return list(targets.values())
    every = range(len(scores.queries))
    return [[query] for query in every] if settings.strategy == "round-robin" else [every]
