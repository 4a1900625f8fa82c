"""Inner products of gradients split over components, and every similarity, accuracy and agreement that follows.

One matrix of products `d[c, q, n]` and the squared norms of both sides are all that is needed: the cosine of any set of
components is `sum_c d / sqrt(sum_c |q|^2 sum_c |n|^2)`. Arrays to arrays; uses no model and no file.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

Objective = Literal["accuracy", "agreement"]
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
        return ComponentProducts(
            self.names, self.parameters, self.values[:, chosen], self.query[:, chosen], self.example, self.rows[chosen]
        )

    def first(self, count: int) -> "ComponentProducts":
        """Return the products of just the first candidates of every query."""
        return ComponentProducts(
            self.names, self.parameters, self.values[:, :, :count], self.query, self.example, self.rows[:, :count]
        )

    def cosine(self, components: Sequence[int] | None = None) -> Float[np.ndarray, "query candidate"]:
        """Return the cosine of the joint gradients of components, all by default; float64, zero where not listed."""
        chosen = slice(None) if components is None else np.asarray(components, dtype=np.int64)
        values, query, example = (
            part[chosen].sum(0, dtype=np.float64)[None] for part in (self.values, self.query, self.example)
        )
        return cosines(values, query, example[:, self.rows])[0]

    def product(self) -> Float[np.ndarray, "query candidate"]:
        """Return the inner product of the whole gradients, in float64."""
        return self.values.sum(0, dtype=np.float64)

    def each(self, components: Sequence[int] | None = None) -> Float[np.ndarray, "component query candidate"]:
        """Return the cosine of every component by itself, in float64."""
        chosen = slice(None) if components is None else np.asarray(components, dtype=np.int64)
        values, query, example = (part[chosen].astype(np.float64) for part in (self.values, self.query, self.example))
        return cosines(values, query, example[:, self.rows])


def cosines(
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
    shown = np.where(listed, scores, -np.inf)
    best = (shown == shown.max(-1, keepdims=True)) & listed
    return (best & right).sum(-1) / np.maximum(best.sum(-1), 1)


def agreement(
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
    weights = listed.astype(np.float64)
    if centred:
        counts = np.maximum(weights.sum(-1, keepdims=True), 1)
        scores = scores - (scores * weights).sum(-1, keepdims=True) / counts
        full = full - (full * weights).sum(-1, keepdims=True) / counts
    first, second = scores * weights, full * weights
    lengths = np.sqrt((first**2).sum((-2, -1)) * (second**2).sum())
    return (first * second).sum((-2, -1)) / np.maximum(lengths, 1e-300)
