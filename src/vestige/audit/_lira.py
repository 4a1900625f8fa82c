"""The likelihood ratio attack: was this model trained on this example, judged by models that were and were not."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from vestige.audit._counterfactual import checked
from vestige.audit._gaussians import gaussians, log_density
from vestige.errors import DataError

SHRINKAGE = 4.0


class Lira(NamedTuple):
    """Evidence that a model was trained on each example, and how many have none."""

    score: Float[np.ndarray, "example"]
    """Above zero, or high, speaks for membership; NaN where it cannot be computed."""
    uncomputable: int
    """Examples without a score: fewer than two models on a side, or a value that is not finite."""


def lira(
    target: Float[np.ndarray, "example"],
    values: Float[np.ndarray, "member example"],
    membership: Bool[np.ndarray, "member example"],
    *,
    left_out: Bool[np.ndarray, "member"] | None = None,
    shrinkage: float = SHRINKAGE,
) -> Lira:
    """Return the log-likelihood ratio of the target's values, trained on each example against not trained on it.

        log N(g; mu_in, sigma_in) - log N(g; mu_out, sigma_out)

    Carlini et al. 2022, "Membership inference attacks from first principles", online form. In log space: a value at
    1,000 deviations has a finite score, and nothing is clamped.

    Args:
        target: Value of each example under the model in question, at whichever checkpoint.
        values: The same under the bank's models; they rise as an example is known better. Margins and gaps are closest
            to Gaussian.
        membership: True where the member was trained on the example.
        left_out: Members that must not take part: the target itself, and others trained on the same subset.
        shrinkage: Weight of the pooled variance, in models.

    Raises:
        DataError: Shapes that do not agree.
    """
    values, target, taken = _prepared(target, values, membership, left_out)
    inside = gaussians(values, membership & taken, shrinkage)
    outside = gaussians(values, ~membership & taken, shrinkage)
    return _counted(log_density(target, inside) - log_density(target, outside))


def lira_offline(
    target: Float[np.ndarray, "example"],
    values: Float[np.ndarray, "member example"],
    membership: Bool[np.ndarray, "member example"],
    *,
    left_out: Bool[np.ndarray, "member"] | None = None,
    shrinkage: float = SHRINKAGE,
) -> Lira:
    """Return how surprising the target's values are for models that were not trained on the example, nats.

        -log P(Z > g), Z ~ N(mu_out, sigma_out)

    The offline form of Carlini et al. 2022: it needs no model that was trained on the examples. Between 0 and infinity;
    0.69 is what such a model has in the middle. Arguments as in `lira`.

    Raises:
        DataError: Shapes that do not agree.
    """
    from scipy.stats import norm

    values, target, taken = _prepared(target, values, membership, left_out)
    outside = gaussians(values, ~membership & taken, shrinkage)
    return _counted(-np.asarray(norm.logsf((target - outside.mean) / outside.deviation), dtype=np.float64))


def lira_of_members(
    values: Float[np.ndarray, "member example"],
    membership: Bool[np.ndarray, "member example"],
    *,
    subsets: Int[np.ndarray, "member"] | None = None,
    shrinkage: float = SHRINKAGE,
) -> Float[np.ndarray, "member example"]:
    """Return every member's score as the target, by the other members alone; NaN where it cannot be computed.

    Args:
        values: As in `lira`.
        membership: As in `lira`.
        subsets: Number of the subset of each member: all members of the target's subset are left out with it. Without
            it, only the target.
        shrinkage: As in `lira`.

    Raises:
        DataError: Shapes that do not agree.
    """
    groups = np.arange(len(values)) if subsets is None else np.asarray(subsets)
    rows = [
        lira(row, values, membership, left_out=groups == group, shrinkage=shrinkage).score
        for row, group in zip(values, groups, strict=True)
    ]
    return np.stack(rows) if rows else np.zeros_like(values, dtype=np.float64)


def _prepared(
    target: np.ndarray, values: np.ndarray, membership: np.ndarray, left_out: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    values, target = checked(values, membership), np.asarray(target, dtype=np.float64)
    if target.shape != values.shape[1:]:
        raise DataError(f"The target has {target.shape} values, the bank's members {values.shape[1:]}.")
    if left_out is not None and left_out.shape != values.shape[:1]:
        raise DataError(f"left_out has {left_out.shape} entries for {len(values)} members.")
    taken = np.ones(len(values), dtype=bool) if left_out is None else ~left_out
    return values, np.where(np.isfinite(target), target, np.nan), taken[:, None]


def _counted(score: np.ndarray) -> Lira:
    return Lira(score, int(np.isnan(score).sum()))
