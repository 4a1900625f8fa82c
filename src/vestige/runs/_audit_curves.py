"""Data behind the figures of an audit: groups, ROC curves, agreement of measures. Shared by files and the page."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from vestige.runs._audit_record import CanaryRecord

OTHERS = {"membership": "holdout", "flag": "others", "memorized": "others"}
NAMES = {"membership": "members", "flag": "flagged", "memorized": "memorized at the end"}


def group_of(
    known: Sequence[tuple[str, Bool[np.ndarray, "example"], Bool[np.ndarray, "example"]]],
    own: Bool[np.ndarray, "example"],
) -> dict[str, Bool[np.ndarray, "example"]]:
    """Return the rows of each line by name: the sides of the last truth that is known, else the data.

    Args:
        known: (name, what is to be found, where that is known).
        own: The data's own examples.
    """
    for name, found, judged in reversed(known):
        sides = {NAMES[name]: found & judged, OTHERS[name]: ~found & judged}
        if all(side.any() for side in sides.values()):
            return sides
    return {"examples": own}


def roc_curve(
    scores: Float[np.ndarray, "example"], found: Bool[np.ndarray, "example"]
) -> tuple[Float[np.ndarray, "point"], Float[np.ndarray, "point"]]:
    """Return false and true positive rates from the highest score down; equal scores are flagged together."""
    known = ~np.isnan(scores)
    scores, found = scores[known], found[known]
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)
    right, wrong = np.cumsum(found[order])[ends], np.cumsum(~found[order])[ends]
    return np.append(0.0, wrong / max((~found).sum(), 1)), np.append(0.0, right / max(found.sum(), 1))


def agreement(columns: Mapping[str, Float[np.ndarray, "example"]]) -> tuple[list[str], Float[np.ndarray, "one other"]]:
    """Return the measures that vary, and Spearman's correlation of each two over the examples that have both."""
    from scipy.stats import rankdata

    varying = {name: values for name, values in columns.items() if len(np.unique(values[~np.isnan(values)])) > 1}
    names = list(varying)
    table = np.full((len(names), len(names)), np.nan)
    for one, first in enumerate(names):
        for other, second in enumerate(names):
            both = ~np.isnan(varying[first]) & ~np.isnan(varying[second])
            if both.sum() < 3:
                continue
            ranks = [rankdata(varying[name][both]) for name in (first, second)]
            if all(each.std() > 0 for each in ranks):
                table[one, other] = np.corrcoef(*ranks)[0, 1]
    return names, table


class Exposed(NamedTuple):
    """Planted secrets that stand equally often in the training data, under one checkpoint."""

    copies: int | None
    """None where the canaries do not state it."""
    checkpoint: int
    secrets: int
    mean: float
    """Of their exposures, bits."""
    low: float
    high: float
    """95 % interval of the mean by Student's t, within what exposure can be; NaN for a single secret."""


def exposed(canaries: Sequence[CanaryRecord]) -> list[Exposed]:
    """Return mean exposure by number of copies and then by checkpoint; secrets without a finite loss do not count."""
    from scipy.stats import t

    groups: dict[tuple[int, int], list[CanaryRecord]] = {}
    for each in canaries:
        if each.exposure is not None:
            key = (-1 if each.copies is None else each.copies, each.checkpoint)
            groups.setdefault(key, []).append(each)
    found = []
    for (copies, checkpoint), group in sorted(groups.items()):
        values, most = np.array([each.exposure for each in group]), max(each.most for each in group)
        count, mean, reach = len(values), float(values.mean()), np.nan
        if count > 1:
            reach = float(t.ppf(0.975, count - 1) * values.std(ddof=1) / np.sqrt(count))
        ends = (max(mean - reach, 0.0), min(mean + reach, most)) if count > 1 else (np.nan, np.nan)
        found.append(Exposed(None if copies < 0 else copies, checkpoint, count, mean, *ends))
    return found
