"""Quantile regression: how far an example stands above what examples like it reach without being trained on."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from jaxtyping import Bool, Float

from vestige.errors import DataError, SpecError
from vestige.measures._measure import Column, Losses, Rule, measure

Features = Float[np.ndarray, "example feature"]

LEVEL = 0.95
"""Quantile of the held-out examples that is predicted: 5 % of others are above it."""
FEWEST = 20
"""Held-out examples: with fewer of them a quantile of 0.95 is their largest value."""
FOLDS = 5


def quantile_excess(
    scores: Column,
    features: Features,
    held_out: Bool[np.ndarray, "example"],
    *,
    level: float = LEVEL,
    folds: int = FOLDS,
    seed: int = 0,
) -> Column:
    """Return each score minus the quantile that held-out examples with its features reach; high speaks for membership.

        excess(x) = s(x) - q(x),  q(x) the `level` quantile of s given the features, fitted by the pinball loss

    Bertran et al. 2023, "Scalable membership inference attacks via quantile regression". Only held-out examples are
    fitted, so 0 is a threshold that about 1 - level of others pass, whatever the members are like. Every example, held
    out or not, is judged by a fit of the folds that it is not in, so that the two sides are treated alike.

    Args:
        scores: Higher for what was learned better, such as minus the mean loss; NaN where there is none.
        features: Of the text, or of another model; never of the model under audit.
        held_out: Examples that were not trained on.
        level: Between 0 and 1.
        folds: Fits.
        seed: Of the folds.

    Returns:
        NaN where there is no score, or fewer than `FEWEST` held-out ones.

    Raises:
        DataError: Shapes that do not agree.
        SpecError: A level outside (0, 1), or fewer than two folds.
    """
    from sklearn.ensemble import HistGradientBoostingRegressor

    if features.ndim != 2 or scores.shape != held_out.shape or len(features) != len(scores):
        raise DataError(
            f"Scores {scores.shape}, features {features.shape}, held_out {held_out.shape}: one per example."
        )
    if not 0 < level < 1 or folds < 2:
        raise SpecError(f"level={level}, folds={folds}: give a number between 0 and 1, and two folds or more.")
    found = np.full(len(scores), np.nan)
    known = np.isfinite(scores)
    if (known & held_out).sum() < FEWEST:
        return found
    fold = _draw_folds(known & held_out, folds, seed) + _draw_folds(known & ~held_out, folds, seed)
    for number in range(1, folds + 1):
        fit, judged = known & held_out & (fold != number), fold == number
        if judged.any():
            # Early stopping would draw from numpy's global generator above 10,000 examples.
            model = HistGradientBoostingRegressor(
                loss="quantile", quantile=level, max_iter=60, max_leaf_nodes=8, early_stopping=cast(Any, False)
            )
            found[judged] = scores[judged] - model.fit(features[fit], scores[fit]).predict(features[judged])
    return found


def text_features(texts: Sequence[str], targets: Column) -> Features:
    """Return what a text alone gives away of its loss: letters, words, tokens, and how well zlib packs it."""
    rows = []
    for text, count in zip(texts, targets, strict=True):
        letters = max(len(text), 1)
        packed = len(zlib.compress(text.encode("utf-8")))
        digits = sum(letter.isdigit() for letter in text)
        rows.append([letters, len(text.split()), count, letters / max(count, 1), packed / letters, digits / letters])
    return np.array(rows, dtype=np.float64).reshape(len(texts), 6)


def _draw_folds(chosen: Bool[np.ndarray, "example"], folds: int, seed: int) -> np.ndarray:
    """Return the fold of each chosen example, 1 to `folds`, of nearly equal sizes; 0 for the others."""
    found = np.zeros(len(chosen), dtype=np.int64)
    rows = np.random.default_rng(seed).permutation(np.flatnonzero(chosen))
    found[rows] = np.arange(len(rows)) % folds + 1
    return found


@measure(
    "quantile_excess",
    "minus the loss, above the 95 % quantile of held-out examples with its length, density and reference loss",
    stage="losses",
    needs=("token scores", "tokenizer", "holdout"),
    sign=1,
    relative=True,
    missing=f"no target token, or fewer than {FEWEST} held-out examples",
    cost="five fits of small trees on the holdout for each checkpoint",
    limits="as good as the holdout: it must be drawn like the data, and hold hundreds of examples for a sharp quantile",
    rule=Rule(0.0, "members"),
    order=87,
    curve=45,
)
def _quantile_excess(losses: Losses) -> Column:
    if losses.texts is None:
        return np.full(len(losses.mean), np.nan)
    features = text_features(losses.texts, losses.data.target_counts)
    if losses.reference_total is not None:
        features = np.column_stack([features, losses.reference_total / losses.targets])
    return quantile_excess(-losses.mean, features, losses.held_out, seed=losses.settings.seed)
