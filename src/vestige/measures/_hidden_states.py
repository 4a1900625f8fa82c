"""Measures of hidden states: PSMI of each example, SMI of a whole layer, and the distance from the other states."""

from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from vestige.errors import DataError, SpecError
from vestige.measures._measure import Column, Rule, States, measure

StateRows = Float[np.ndarray, "example hidden"]
Labels = Int[np.ndarray, "example"]

BLOCK = 500
"""Directions that are drawn together; the automatic number is a multiple."""
_VALUES = 2**17
"""Examples times directions in memory at once; more would leave the processor's cache."""
_FLOOR = 1e-6
"""Smallest deviation of a class along a direction, over the deviation of everything: no density is infinite."""
_LOWEST, _CHANGE = 0.05, 0.05
_SMI_DIRECTIONS = 200
"""Of SMI, where the settings do not say how many."""
_NOTHING = 1e-10
"""Principal axes shorter than this times the longest are rounding."""
_ALONE = "an example needs a class that another one of the data has too; the holdout is not measured"


class Psmi(NamedTuple):
    """PSMI of each example over the directions, nats; NaN for an example whose label it has to itself."""

    mean: Column
    """Low or negative: atypical for its label, at risk of being memorized."""
    std: Column
    """Over directions, population form."""
    low: Column
    """1 % quantile over directions."""
    high: Column
    """99 % quantile over directions."""
    directions: int
    converged: bool
    """Whether the automatic number sufficed; True where the number was given."""
    uncomputable: int
    """Examples that have no value."""


class _Slices(NamedTuple):
    """Directions with the Gaussian of each class along each of them."""

    directions: Float[np.ndarray, "hidden direction"]
    means: Float[np.ndarray, "label direction"]
    deviations: Float[np.ndarray, "label direction"]
    log_priors: Float[np.ndarray, "label"]


def psmi(
    states: StateRows, labels: Labels, *, directions: int | None = None, seed: int = 0, most: int = 20_000
) -> Psmi:
    """Compute PSMI of each state and its label, in log space and float64.

        PSMI_i = mean over j of log( N(u_ij; mu_yj, sigma_yj) / sum over c of pi_c N(u_ij; mu_cj, sigma_cj) )

    with u_ij = theta_j . h_i, theta_j uniform on the sphere. Wongso et al. 2023, "Pointwise sliced mutual information
    for neural network explainability"; as a predictor of memorization, Dentan et al. 2024. Means and deviations
    are those of the examples given (population form), priors their shares.

    The directions depend on nothing but `seed` and the width of the states, so layers and checkpoints are compared
    along the same ones, and the same call gives the same bits.

    Args:
        states: Hidden states at the position that predicts the answer.
        labels: The label that each example was trained with, as whole numbers.
        directions: If not given, blocks of 500 are added until the 5 % lowest means differ, on average and
            relative to themselves, by at most 5 % from what the first half of the blocks gives.
        seed: Seed.
        most: Where the automatic number ends in any case.

    Raises:
        DataError: Shapes that do not agree, states that are not finite, or no label with two examples.
        SpecError: No directions requested.
    """
    states, labels = np.asarray(states, dtype=np.float64), np.asarray(labels)
    if states.ndim != 2 or labels.shape != states.shape[:1] or not states.size:
        raise DataError(f"States {states.shape} and labels {labels.shape}: give [example, hidden] and one label each.")
    if not np.isfinite(states).all():
        row = int(np.flatnonzero(~np.isfinite(states).all(1))[0])
        raise DataError(f"The hidden state of example {row} is not finite, so it cannot be compared with the others.")
    if (directions is not None and directions < 1) or most < BLOCK:
        raise SpecError(f"directions={directions}, most={most}: give 1 or more directions, and most={BLOCK} or more.")
    names, counts = np.unique(labels, return_counts=True)
    names = names[counts > 1]
    known = np.isin(labels, names)
    if not len(names):
        raise DataError("No label has two examples, so no class has a spread. Are the labels ids of examples?")
    inside, codes, converged = states[known], np.searchsorted(names, labels[known]), True
    if directions is None:
        directions, converged = _count_directions(inside, codes, seed, most)
    slices = _fit_slices(inside, codes, directions, seed)
    values = np.full((4, len(states)), np.nan)
    values[:, known] = np.concatenate([_summarize(part) for part in _compute_pointwise(inside, codes, slices)], axis=1)
    return Psmi(*values, directions=directions, converged=converged, uncomputable=int((~known).sum()))


def _summarize(values: Float[np.ndarray, "row direction"]) -> Float[np.ndarray, "4 row"]:
    low, high = np.quantile(values, [0.01, 0.99], axis=1)
    return np.stack([values.mean(1), values.std(1), low, high])


def draw_directions(width: int, count: int, seed: int) -> Float[np.ndarray, "hidden direction"]:
    """Draw unit vectors uniformly from the sphere; the first N are the same for any count."""
    blocks = []
    for block in range(-(-count // BLOCK)):
        draw = np.random.default_rng([seed, block]).standard_normal((width, BLOCK))
        blocks.append(draw / np.linalg.norm(draw, axis=0))
    return np.concatenate(blocks, axis=1)[:, :count]


def _count_directions(states: np.ndarray, codes: np.ndarray, seed: int, most: int) -> tuple[int, bool]:
    """Return the automatic number of directions, and whether it met its rule."""
    means: list[np.ndarray] = []
    while (len(means) + 1) * BLOCK <= most:
        count = (len(means) + 1) * BLOCK
        block = _fit_slices(states, codes, count, seed, first=count - BLOCK)
        means.append(np.concatenate([part.mean(1) for part in _compute_pointwise(states, codes, block)]))
        if len(means) > 1:
            whole, half = (np.stack(blocks).mean(0) for blocks in (means, means[: len(means) // 2]))
            lowest = np.argsort(whole, kind="stable")[: max(1, round(_LOWEST * len(whole)))]
            size = np.maximum(np.abs(whole[lowest]), np.finfo(np.float64).tiny)
            if (np.abs(whole - half)[lowest] / size).mean() <= _CHANGE:
                return count, True
    return len(means) * BLOCK, False


def _fit_slices(states: np.ndarray, codes: np.ndarray, count: int, seed: int, first: int = 0) -> _Slices:
    """Fit the Gaussians of each class along directions `first` to `count`, a block of directions at a time."""
    directions = draw_directions(states.shape[1], count, seed)[:, first:]
    sizes = np.bincount(codes)
    members = [codes == code for code in range(len(sizes))]
    means, deviations = (np.empty((len(sizes), directions.shape[1])) for _ in range(2))
    for begin in range(0, directions.shape[1], BLOCK):
        part = slice(begin, begin + BLOCK)
        along = states @ directions[:, part]
        floor = _FLOOR * along.std(0)
        for code, rows in enumerate(members):
            means[code, part], deviations[code, part] = along[rows].mean(0), np.maximum(along[rows].std(0), floor)
    # Along a direction in which nothing varies, all classes are alike: any deviation will do.
    deviations[deviations == 0] = 1.0
    return _Slices(directions, means, deviations, np.log(sizes / sizes.sum()))


def _compute_pointwise(
    states: np.ndarray, codes: np.ndarray, slices: _Slices
) -> Iterator[Float[np.ndarray, "row direction"]]:
    """Yield the pointwise information of each example along each direction, some rows at a time."""
    count = max(1, _VALUES // slices.directions.shape[1])
    for begin in range(0, len(states), count):
        rows = slice(begin, begin + count)
        along = states[rows] @ slices.directions
        own, whole = np.empty_like(along), np.full_like(along, -np.inf)
        for code, prior in enumerate(slices.log_priors):
            spread = slices.deviations[code]
            # Constants that all classes share cancel out.
            density = -0.5 * ((along - slices.means[code]) / spread) ** 2 - np.log(spread)
            whole = np.logaddexp(whole, density + prior)
            mine = codes[rows] == code
            own[mine] = density[mine]
        yield own - whole


class Smi(NamedTuple):
    """Mutual information of label and sliced state over the directions, nats; NaN without two labels."""

    mean: float
    low: float
    """1 % quantile."""
    high: float
    """99 % quantile."""


def smi(states: StateRows, labels: Labels, *, directions: int = 2000, neighbours: int = 3, seed: int = 0) -> Smi:
    """Return mean and quantiles over random directions of the information that a slice of the states has on the labels.

    Goldfeld and Greenewald 2021, "Sliced mutual information"; each slice by nearest neighbours, Ross 2014, as
    scikit-learn has it. The directions are those of `psmi`. A group without examples, or with one label alone, gives
    NaN: there is nothing to be predicted.

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
    slices = np.asarray(states, dtype=np.float64) @ draw_directions(states.shape[1], directions, seed)
    found = mutual_info_classif(slices, labels, n_neighbors=neighbours, random_state=seed)
    low, high = np.quantile(found, [0.01, 0.99])
    return Smi(float(found.mean()), float(low), float(high))


def choose_layer(
    states: Mapping[int, StateRows],
    labels: Labels,
    *,
    by: Literal["last", "smi"] = "last",
    directions: int = 200,
    seed: int = 0,
) -> int:
    """Choose the layer whose states are to be measured from the task alone, not from what was memorized.

    `last` is the last layer, `smi` the one with most sliced mutual information (the last of equals), by `directions`
    and `seed`. States are given by number of layer, labels as the examples were trained with.

    Raises:
        DataError: There are no layers.
    """
    if not states:
        raise DataError("There are no hidden states to choose a layer from.")
    if by == "last":
        return max(states)
    values = {layer: smi(each, labels, directions=directions, seed=seed).mean for layer, each in states.items()}
    return max(values, key=lambda layer: (values[layer], layer))


def mahalanobis(states: StateRows, fitted_on: StateRows | None = None, *, dimensions: int = 100) -> Column:
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
    "psmi",
    "how far the hidden state is what the label makes one expect",
    stage="states",
    needs=("hidden states", "classes"),
    early_sign=-1,
    high="typical of its label; low ones are at risk of being memorized",
    details=("std", "low", "high", "slope"),
    since_first=True,
    missing=_ALONE,
    cost="500 to 20,000 projections of the states of each layer",
    limits="predicts from an early checkpoint what will be memorized; needs classes, and directions are random",
    rule=Rule(0.0, "at risk"),
    order=120,
    curve=10,
    over_time=True,
)
def _psmi(states: States) -> dict[str, Column]:
    chosen, settings = states.classed, states.settings
    if not chosen.any():
        return {"psmi": np.full(len(chosen), np.nan)}
    found = psmi(states.values[chosen], states.classes[chosen], directions=settings.directions, seed=settings.seed)
    names = ("psmi", "psmi_std", "psmi_low", "psmi_high")
    columns = {name: states.spread(part, chosen) for name, part in zip(names, found[:4], strict=True)}
    return columns | {"layer:directions": np.array([found.directions, found.converged], dtype=np.float64)}


@measure(
    "smi",
    "information of a layer's states about the labels (of a layer)",
    stage="states",
    needs=("hidden states", "classes"),
    of="layer",
    by_default=False,
    missing=_ALONE,
    cost="a nearest-neighbour estimate for each of 200 directions and layer",
    limits="chooses a layer for PSMI; says nothing about a single example",
    order=140,
)
def _smi(states: States) -> dict[str, Float[np.ndarray, "3"]]:
    chosen, settings = states.classed, states.settings
    if not chosen.any():
        return {}
    directions = settings.directions or _SMI_DIRECTIONS
    found = smi(states.values[chosen], states.classes[chosen], directions=directions, seed=settings.seed)
    return {"layer:smi": np.array(found, dtype=np.float64)}


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
    if own.sum() < 2:
        return {}
    found = mahalanobis(states.values[finite], states.values[own], dimensions=states.settings.dimensions)
    return {"mahalanobis": states.spread(found, finite)}
