"""Sliced mutual information: how much a layer's states predict the labels, and which layer predicts most."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from vestige.audit._psmi import sphere
from vestige.errors import DataError, SpecError


class Smi(NamedTuple):
    """Mutual information of label and sliced state over the directions, nats; NaN without two labels."""

    mean: float
    low: float
    """1 % quantile."""
    high: float
    """99 % quantile."""


def smi(
    states: Float[np.ndarray, "example hidden"],
    labels: Int[np.ndarray, "example"],
    *,
    directions: int = 2000,
    neighbours: int = 3,
    seed: int = 0,
) -> Smi:
    """Return mean and quantiles over random directions of the information that a slice of the states has on the labels.

    Goldfeld and Greenewald 2021, "Sliced mutual information"; each slice by nearest neighbours, Ross 2014, as
    scikit-learn has it. The directions are those of `psmi`.

    A group without examples, or with one label alone, gives NaN: there is nothing to be predicted.

    Raises:
        DataError: Shapes that do not agree.
        SpecError: No directions requested.
    """
    from sklearn.feature_selection import mutual_info_classif

    if directions < 1:
        raise SpecError(f"directions={directions}: give 1 or more.")
    if states.ndim != 2 or labels.shape != states.shape[:1]:
        raise DataError(f"States {states.shape} and labels {labels.shape}: give [example, hidden] and one label each.")
    if len(np.unique(labels)) < 2 or len(states) <= neighbours:
        return Smi(np.nan, np.nan, np.nan)
    slices = np.asarray(states, dtype=np.float64) @ sphere(states.shape[1], directions, seed)
    found = mutual_info_classif(slices, labels, n_neighbors=neighbours, random_state=seed)
    low, high = np.quantile(found, [0.01, 0.99])
    return Smi(float(found.mean()), float(low), float(high))


def choose_layer(
    states: Mapping[int, Float[np.ndarray, "example hidden"]],
    labels: Int[np.ndarray, "example"],
    *,
    by: Literal["last", "smi"] = "last",
    directions: int = 200,
    seed: int = 0,
) -> int:
    """Choose the layer whose states are to be measured from the task alone, not from what was memorized.

    Args:
        states: By number of layer.
        labels: That the examples were trained with, for `by="smi"`.
        by: `last` layer, or the one with most sliced mutual information (the last of equals).
        directions: For `by="smi"`.
        seed: For `by="smi"`.

    Raises:
        DataError: There are no layers.
    """
    if not states:
        raise DataError("There are no hidden states to choose a layer from.")
    if by == "last":
        return max(states)
    found = {layer: smi(values, labels, directions=directions, seed=seed).mean for layer, values in states.items()}
    return max(found, key=lambda layer: (found[layer], layer))
