"""Similarities, accuracy and agreement from products by component, and greedy search for sets that suffice.

One matrix of products `d[c, q, n]` and the squared norms of both sides are all that is needed: the cosine of any set of
components is `sum_c d / sqrt(sum_c |q|^2 sum_c |n|^2)`. Arrays to arrays; uses no model and no file.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

Objective = Literal["accuracy", "agreement"]
OBJECTIVES: tuple[Objective, ...] = ("accuracy", "agreement")
CHOOSING = 50
"""Most candidates of each query that sets are chosen on; they are measured on all."""
_BLOCK_NUMBERS = 2**21
"""Most similarities formed at once."""
_TIED = 1e-12
_SMALLEST = 1e-300


@dataclass(frozen=True)
class ComponentProducts:
    """Products of every query with its candidates, split over components; all that was computed once."""

    names: tuple[str, ...]
    parameters: Int[np.ndarray, " component"]
    """Numbers of parameters of each component."""
    values: Float[np.ndarray, "component query candidate"]
    """Inner products; what is not listed is zero."""
    query: Float[np.ndarray, "component query"]
    """Squared norms of the queries' gradients."""
    example: Float[np.ndarray, "component example"]
    """Squared norms of the examples' gradients."""
    rows: Int[np.ndarray, "query candidate"]
    """Which example each candidate is, the first one ranking highest in the list; -1 where a list is shorter."""

    @property
    def listed(self) -> Bool[np.ndarray, "query candidate"]:
        """The mask of existing candidates."""
        return self.rows >= 0

    def of(self, queries: Sequence[int] | Int[np.ndarray, " query"]) -> "ComponentProducts":
        """Return the products of just these queries, in this order."""
        chosen = np.asarray(queries, dtype=np.int64)
        return replace(self, values=self.values[:, chosen], query=self.query[:, chosen], rows=self.rows[chosen])

    def first(self, count: int) -> "ComponentProducts":
        """Return the products of just the first candidates of every query."""
        return replace(self, values=self.values[:, :, :count], rows=self.rows[:, :count])

    def cosine(self, components: Sequence[int] | None = None) -> Float[np.ndarray, "query candidate"]:
        """Return the cosine of the joint gradients of components, all by default; float64, zero where not listed."""
        chosen = slice(None) if components is None else np.asarray(components, dtype=np.int64)
        parts = (self.values, self.query, self.example)
        values, query, example = (part[chosen].sum(0, dtype=np.float64) for part in parts)
        return _cosines(values, query, example[self.rows])


def _cosines(
    values: Float[np.ndarray, "*set query candidate"],
    query: Float[np.ndarray, "*set query"],
    example: Float[np.ndarray, "*set query candidate"],
) -> Float[np.ndarray, "*set query candidate"]:
    """Divide products by both lengths; zero where a gradient is zero, for then its products are zero too."""
    lengths = query[..., None] * example
    np.maximum(lengths, _SMALLEST, out=lengths)
    return values / np.sqrt(lengths, out=lengths)


def credit(
    scores: Float[np.ndarray, "*set query candidate"],
    right: Bool[np.ndarray, "query candidate"],
    listed: Bool[np.ndarray, "query candidate"],
) -> Float[np.ndarray, "*set query"]:
    """Return 1 where the best candidate is right, 0 where it is wrong; of tied ones, the share that is right.

    A query without its original among the candidates is wrong. No position in the list decides anything.
    """
    ranked = np.where(listed, scores, -np.inf)
    best = (ranked == ranked.max(-1, keepdims=True)) & listed
    return (best & right).sum(-1) / np.maximum(best.sum(-1), 1)


def centre_lists(
    scores: Float[np.ndarray, "*set query candidate"], listed: Bool[np.ndarray, "query candidate"]
) -> Float[np.ndarray, "*set query candidate"]:
    """Return the scores minus the mean of each query's list."""
    weights = listed.astype(np.float64)
    return scores - (scores * weights).sum(-1, keepdims=True) / np.maximum(weights.sum(-1, keepdims=True), 1)


def compute_agreement(
    scores: Float[np.ndarray, "*set query candidate"],
    full: Float[np.ndarray, "query candidate"],
    listed: Bool[np.ndarray, "query candidate"],
    *,
    centred: bool = False,
) -> Float[np.ndarray, "*set"]:
    """Return the cosine between the similarities of all listed pairs and those of the full gradient.

    Uncentred it is the published measure, near 1 wherever most similarities are positive. `centred` takes the mean of
    each query's list off both: what is left is whether the candidates of one query are distinguished alike.
    """
    if centred:
        scores, full = centre_lists(scores, listed), centre_lists(full, listed)
    first, second = scores * listed, full * listed
    lengths = np.sqrt((first**2).sum((-2, -1)) * (second**2).sum())
    return (first * second).sum((-2, -1)) / np.maximum(lengths, _SMALLEST)


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


class CrossValidation(NamedTuple):
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
    order: Sequence[int] | None = None,
) -> Path:
    """Search the path for top-1 accuracy, or for agreement with the full gradient, one component after another.

    Each step takes the component that helps most, of equal ones that with the fewest parameters, then the first: no
    order of a set or of the data decides. All candidates for a step are tried at once from running sums. With `order`
    the path is that one, however it was chosen, and its values are those on these queries and candidates.
    """
    left = [int(number) for number in np.argsort(products.parameters, kind="stable")] if order is None else [*order]
    parts, full = (products.values, products.query, products.example[:, products.rows]), products.cosine()
    sums = [np.zeros_like(part[0], dtype=np.float64) for part in parts]
    taken, values = list[int](), list[float]()
    for _ in range(min(longest or len(left), len(left))):
        found, choices = [], left if order is None else left[:1]
        for tried in np.array_split(choices, min(len(choices), 1 + len(choices) * parts[0][0].size // _BLOCK_NUMBERS)):
            scores = _cosines(*(total + part[tried] for total, part in zip(sums, parts, strict=True)))
            if objective == "accuracy":
                found.append(credit(scores, right, products.listed).mean(-1))
            else:
                found.append(compute_agreement(scores, full, products.listed))
        reached = np.concatenate(found)
        place = int(np.argmax(reached >= reached.max() - _TIED))
        taken.append(left.pop(place))
        values.append(float(reached[place]))
        sums = [total + part[taken[-1]] for total, part in zip(sums, parts, strict=True)]
    return Path(tuple(taken), tuple(values))


def cross_validate(
    products: ComponentProducts,
    right: Bool[np.ndarray, "query candidate"],
    objective: Objective,
    groups: Int[np.ndarray, " query"],
    *,
    folds: int,
    seed: int,
    longest: int | None = None,
    enough: float | None = None,
) -> CrossValidation:
    """Choose the set without a fold's queries, measure it on them, and so for every fold.

    Queries of one group (paraphrases of one original) are always in the same fold, or a set would be measured on what
    it was chosen by. Sets are chosen on the first `CHOOSING` candidates.
    """
    fold_of = assign_folds(groups, folds, seed)
    shorter, listed = products.first(CHOOSING), products.listed
    credits, cosine = np.zeros(len(groups)), np.zeros(products.rows.shape)
    chosen, train = list[tuple[int, ...]](), list[float]()
    for fold in range(fold_of.max() + 1):
        inside, outside = np.flatnonzero(fold_of != fold), np.flatnonzero(fold_of == fold)
        path = greedy_path(shorter.of(inside), right[inside, :CHOOSING], objective, longest=longest)
        chosen.append(path.best(enough))
        train.append(path.values[len(chosen[-1]) - 1])
        cosine[outside] = products.of(outside).cosine(chosen[-1])
        credits[outside] = credit(cosine[outside], right[outside], listed[outside])
    return CrossValidation(tuple(chosen), float(np.mean(train)), credits, cosine)


def assign_folds(groups: Int[np.ndarray, " query"], folds: int, seed: int) -> Int[np.ndarray, " query"]:
    """Return a random fold for each query, whole groups at a time; as many as there are groups, at most."""
    _, group = np.unique(groups, return_inverse=True)
    count = int(group.max()) + 1
    return np.random.default_rng(seed).permutation(np.arange(count) % min(folds, count))[group]
