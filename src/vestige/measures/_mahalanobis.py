"""How far an example's hidden state is from the others."""

import numpy as np
from jaxtyping import Float

from vestige.errors import DataError, SpecError
from vestige.measures._inputs import Column, States
from vestige.measures._registry import measure

_NOTHING = 1e-10
"""Principal axes shorter than this times the longest are rounding."""
_FEWEST = 2


def mahalanobis(
    states: Float[np.ndarray, "example hidden"],
    fitted_on: Float[np.ndarray, "other hidden"] | None = None,
    *,
    dimensions: int = 100,
) -> Float[np.ndarray, "example"]:
    """Return each state's distance from the mean, in standard deviations along the principal axes; high is atypical.

        sqrt(sum over axes a of (v_a . (x - mu))^2 / variance_a)

    with the variances divided by the number of states (biased). Needs memory for the states and their thin singular
    vectors, O(n d), never n x n.

    Args:
        states: To be measured.
        fitted_on: What mean and axes are taken from; `states` themselves if not given.
        dimensions: Principal axes that are kept, or all that vary where there are fewer.

    Raises:
        DataError: Fewer than two states to fit, values that are not finite, or different widths.
        SpecError: No dimension requested.
    """
    states = np.asarray(states, dtype=np.float64)
    base = states if fitted_on is None else np.asarray(fitted_on, dtype=np.float64)
    if dimensions < 1:
        raise SpecError(f"dimensions={dimensions}: give 1 or more.")
    if states.ndim != 2 or base.ndim != 2 or states.shape[1] != base.shape[1]:
        raise DataError(f"States of shape {states.shape} do not go with states of shape {base.shape}.")
    if len(base) < 2 or not np.isfinite(base).all() or not np.isfinite(states).all():
        raise DataError(f"{len(base)} states: a distance needs two or more, all of finite numbers.")
    mean = base.mean(0)
    _, lengths, axes = np.linalg.svd(base - mean, full_matrices=False)
    kept = min(dimensions, int((lengths > _NOTHING * lengths[0]).sum())) if lengths[0] > 0 else 0
    deviations = lengths[:kept] / np.sqrt(len(base))
    return np.sqrt((((states - mean) @ axes[:kept].T / deviations) ** 2).sum(1))


@measure(
    "mahalanobis",
    "distance of the hidden state from the others",
    stage="states",
    needs=("hidden states",),
    early_sign=1,
    high="atypical",
    cost="a singular value decomposition of the states of each layer",
    limits="finds what is unlike the rest, whether or not it will be memorized",
    order=130,
    curve=80,
)
def _mahalanobis(states: States) -> dict[str, Column]:
    finite, own = states.finite, states.own
    if own.sum() < _FEWEST:
        return {}
    found = mahalanobis(states.values[finite], states.values[own], dimensions=states.settings.dimensions)
    return {"mahalanobis": states.spread(found, finite)}
