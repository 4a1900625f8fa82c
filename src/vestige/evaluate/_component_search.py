"""Which components suffice: greedy paths over sets of components, chosen on some queries and judged on others.

A path takes the component that helps most, again and again. All candidates for a step are tried at once from running
sums of products and norms, so a path over hundreds of components takes seconds.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from vestige.evaluate._component_products import ComponentProducts, Objective, agreement, cosines, credit
from vestige.evaluate._statistics import Estimate, interval

BLOCK_NUMBERS = 2**21
"""Most similarities formed at once."""
CHOOSING = 50
"""Most candidates of each query that sets are chosen on; they are judged on all."""
_TIED = 1e-12


class Path(NamedTuple):
    """Components in the order in which they were taken, and the objective after each."""

    order: tuple[int, ...]
    values: tuple[float, ...]

    def best(self, enough: float | None = None) -> tuple[int, ...]:
        """Return the shortest beginning with the highest value, or the first that reaches `enough`."""
        if not self.order:
            return ()
        values = np.array(self.values)
        reached = values >= (values.max() - _TIED if enough is None else min(enough, values.max()) - _TIED)
        return self.order[: int(np.argmax(reached)) + 1]


class HeldOut(NamedTuple):
    """What sets chosen on some queries are worth on the others; every query was held out once."""

    chosen: tuple[tuple[int, ...], ...]
    """The set of each fold."""
    train: float
    """Mean of the objective on the queries that the sets were chosen on."""
    credit: Float[np.ndarray, " query"]
    """Whether each query's best candidate was right, with the set of the fold that left it out."""
    cosine: Float[np.ndarray, "query candidate"]
    """Similarities with that set."""


def greedy_path(
    products: ComponentProducts,
    right: Bool[np.ndarray, "query candidate"],
    objective: Objective,
    *,
    longest: int | None = None,
) -> Path:
    """Search the path for top-1 accuracy, or for agreement with the full gradient.

    Of components that help equally the one with the fewest parameters is taken, then the first: no order of a set or of
    the data decides.
    """
    count = len(products.names)
    preferred = np.argsort(products.parameters, kind="stable")
    parts = _parts_of(products)
    sums = [np.zeros_like(part[0], dtype=np.float64) for part in parts]
    judge = _Objective(products, right, objective)
    left, order, values = list(preferred), list[int](), list[float]()
    for _ in range(min(longest or count, count)):
        found = np.concatenate([judge.of_sets(_tried(parts, some, sums)) for some in _blocks(products, left)])
        place = int(np.argmax(found >= found.max() - _TIED))
        taken = int(left.pop(place))
        _add(sums, parts, taken)
        order.append(taken)
        values.append(float(found[place]))
    return Path(tuple(order), tuple(values))


class _Objective:
    """What a search is for, on some queries and candidates."""

    def __init__(
        self, products: ComponentProducts, right: Bool[np.ndarray, "query candidate"], objective: Objective
    ) -> None:
        self._full, self._listed, self._right, self._objective = products.cosine(), products.listed, right, objective

    def of_sets(self, found: Float[np.ndarray, "set query candidate"]) -> Float[np.ndarray, " set"]:
        """Return the objective of sets with these similarities."""
        if self._objective == "accuracy":
            return credit(found, self._right, self._listed).mean(-1)
        return agreement(found, self._full, self._listed)


Parts = tuple[np.ndarray, np.ndarray, np.ndarray]


def _parts_of(products: ComponentProducts) -> Parts:
    """Return products and the squared norms of both sides, by component; each adds up over a set."""
    return products.values, products.query, products.example[:, products.rows]


def _blocks(products: ComponentProducts, left: Sequence[int]) -> list[np.ndarray]:
    step = max(1, BLOCK_NUMBERS // max(products.rows.size, 1))
    return [np.array(left[start : start + step]) for start in range(0, len(left), step)]


def _tried(
    parts: Parts, tried: Int[np.ndarray, " set"], sums: Sequence[np.ndarray]
) -> Float[np.ndarray, "set query candidate"]:
    """Return the similarities of the chosen set with each of these components added to it."""
    values, query, example = (total + own[tried] for total, own in zip(sums, parts, strict=True))
    return cosines(values, query, example)


def _add(sums: Sequence[np.ndarray], parts: Parts, taken: int) -> None:
    for total, part in zip(sums, parts, strict=True):
        total += part[taken]


def values_along(
    products: ComponentProducts, right: Bool[np.ndarray, "query candidate"], order: Sequence[int], objective: Objective
) -> tuple[float, ...]:
    """Return the objective after each component of a path, on these queries and candidates, however it was chosen."""
    parts, judge, found = _parts_of(products), _Objective(products, right, objective), list[float]()
    sums = [np.zeros_like(part[0], dtype=np.float64) for part in parts]
    for taken in order:
        _add(sums, parts, taken)
        scores = cosines(sums[0], sums[1], sums[2])
        found.append(float(judge.of_sets(scores[None])[0]))
    return tuple(found)


def held_out(
    products: ComponentProducts,
    right: Bool[np.ndarray, "query candidate"],
    objective: Objective,
    groups: Int[np.ndarray, " query"],
    *,
    folds: int,
    seed: int,
    longest: int | None = None,
    enough: float | None = None,
) -> HeldOut:
    """Cross-validate: choose the set without a fold's queries, and measure it on them.

    Queries of one group (paraphrases of one original) are always in the same fold, or a set would be judged on what it
    was chosen by. Sets are chosen on the first `CHOOSING` candidates.
    """
    fold_of = folds_of(groups, folds, seed)
    shorter, listed = products.first(CHOOSING), products.listed
    found = HeldOut((), 0.0, np.zeros(len(groups)), np.zeros(products.rows.shape))
    chosen, train = list[tuple[int, ...]](), list[float]()
    for fold in range(fold_of.max() + 1):
        inside, outside = np.flatnonzero(fold_of != fold), np.flatnonzero(fold_of == fold)
        path = greedy_path(shorter.of(inside), right[inside, :CHOOSING], objective, longest=longest)
        chosen.append(path.best(enough))
        train.append(path.values[len(chosen[-1]) - 1])
        found.cosine[outside] = products.of(outside).cosine(chosen[-1])
        found.credit[outside] = credit(found.cosine[outside], right[outside], listed[outside])
    return found._replace(chosen=tuple(chosen), train=float(np.mean(train)))


def folds_of(groups: Int[np.ndarray, " query"], folds: int, seed: int) -> Int[np.ndarray, " query"]:
    """Return a random fold for each query, whole groups at a time; as many as there are groups, at most."""
    names, group = np.unique(groups, return_inverse=True)
    random = np.random.default_rng(seed)
    fold = random.permutation(np.arange(len(names)) % min(folds, len(names)))
    return fold[group]


def grouped_estimate(
    values: Float[np.ndarray, " query"], groups: Int[np.ndarray, " query"], draws: int, seed: int
) -> Estimate:
    """Return the mean with a bootstrap interval over groups, not over queries: paraphrases are not independent."""
    _, group = np.unique(groups, return_inverse=True)
    sums, counts = np.bincount(group, values), np.bincount(group)
    value = float(values.mean())
    if len(counts) < 2:
        return Estimate(value, float("nan"), float("nan"))
    picked = np.random.default_rng(seed).integers(len(counts), size=(draws, len(counts)))
    return interval(value, sums[picked].sum(1) / counts[picked].sum(1))


def agreement_estimate(
    scores: Float[np.ndarray, "query candidate"],
    full: Float[np.ndarray, "query candidate"],
    listed: Bool[np.ndarray, "query candidate"],
    groups: Int[np.ndarray, " query"],
    draws: int,
    seed: int,
    *,
    centred: bool = False,
) -> Estimate:
    """Return the agreement with a bootstrap interval over groups of queries."""
    value = float(agreement(scores, full, listed, centred=centred))
    _, group = np.unique(groups, return_inverse=True)
    if centred:
        counts = np.maximum(listed.sum(1, keepdims=True), 1)
        scores, full = (each - (each * listed).sum(1, keepdims=True) / counts for each in (scores, full))
    first, second = scores * listed, full * listed
    parts = [np.bincount(group, row.sum(1)) for row in (first * second, first**2, second**2)]
    if len(parts[0]) < 2:
        return Estimate(value, float("nan"), float("nan"))
    picked = np.random.default_rng(seed).integers(len(parts[0]), size=(draws, len(parts[0])))
    both, one, other = (part[picked].sum(1) for part in parts)
    return interval(value, both / np.maximum(np.sqrt(one * other), 1e-300))
