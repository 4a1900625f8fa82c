"""Sinks that need no compression: whole gradients, exact inner products and exact norms."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vestige.gradients._cross import FormingBudget, Gradients, HeldGradients, Piece, square_norms
from vestige.gradients._factors import Factor, FactorSink, materialise
from vestige.models import Component


class GradientSink(FactorSink):
    """Keeps every example's whole gradient, one `[example, out, in]` tensor per component.

    Costs `examples * parameters` numbers: for queries and for tests.
    """

    def __init__(self, components: Sequence[Component]) -> None:
        self._shapes = [component.shape for component in components]
        self.gradients: list[Tensor] = []

    def begin(self, examples: int, device: torch.device | str, dtype: torch.dtype = torch.float32) -> None:
        """Start a batch with zeros."""
        self.gradients = [torch.zeros(examples, *shape, device=device, dtype=dtype) for shape in self._shapes]

    def accumulate(self, component: int, examples: slice, left: Factor, right: Tensor) -> None:
        """Add the gradient matrix."""
        total = self.gradients[component][examples]
        if isinstance(left, Tensor) and left.dtype == right.dtype == total.dtype:
            total.baddbmm_(left.transpose(1, 2), right)
        else:
            total += materialise(left, right).to(total)


class DotSink(FactorSink):
    """Exact inner products of each example's gradient with given ones, per component.

    `vectors[c]` is `[query, out, in]` for component `c`, or the queries' `Gradients` as factors (as `KeepingSink` gives
    them, or `low_rank`): then their matrices are formed only if that is cheaper, at once for the `batches` expected.
    `scores` is `[component, query, example]`; its sum over components is the inner product of the whole gradients.
    """

    def __init__(self, vectors: Sequence[Float[Tensor, "query _out _in"] | Gradients], batches: int = 1) -> None:
        given = [
            one if isinstance(one, Gradients) else Gradients(len(one), (one.shape[1], one.shape[2]), matrices=one)
            for one in vectors
        ]
        self._like = next((one.like() for one in given if not one.zero), torch.zeros(()))
        self._queries, self._shapes = given[0].examples, [one.shape for one in given]
        budget = FormingBudget()
        self._held = [HeldGradients(one, budget, batches) for one in given]
        self.scores = torch.zeros(0)

    def begin(self, examples: int) -> None:
        """Start a batch with zeros."""
        self.scores = self._like.new_zeros(len(self._held), self._queries, examples)

    def accumulate(self, component: int, examples: slice, left: Factor, right: Tensor) -> None:
        """Add the inner products of one use of the component."""
        count = len(right)
        batch = Gradients(count, self._shapes[component], (Piece(slice(0, count), left, right),))
        found = self._held[component].products(batch)
        self.scores[component, :, examples] += found.T.to(self.scores)


class KeepingSink(FactorSink):
    """Keeps the factors of a batch, all pieces of every component: `finish` returns them as `Gradients`.

    The uses of a tied weight and the chunks of a loss are pieces of one gradient, so their cross terms count.
    """

    def __init__(self, components: Sequence[Component]) -> None:
        self._shapes = [component.shape for component in components]
        self._pieces: list[list[Piece]] = []
        self._examples = 0

    def begin(self, examples: int) -> None:
        """Start a batch."""
        self._examples = examples
        self._pieces = [[] for _ in self._shapes]

    def accumulate(self, component: int, examples: slice, left: Factor, right: Any) -> None:
        """Keep the piece."""
        self._pieces[component].append(Piece(examples, left, right))

    def finish(self) -> list[Gradients]:
        """Return the gradients of every component as factors; the sink forgets them."""
        pairs = zip(self._shapes, self._pieces, strict=True)
        gradients = [Gradients(self._examples, (shape[0], shape[1]), tuple(pieces)) for shape, pieces in pairs]
        self._pieces = []
        return gradients


class NormSink(KeepingSink):
    """Exact squared norm of each example's gradient, per component: `squared` is `[component, example]`.

    By ghost products where tokens are few, by the matrix itself where they are many (`own_ghost_is_cheaper`).
    """

    squared = torch.zeros(0)

    def finish(self) -> Float[Tensor, "component example"]:  # type: ignore[override]
        """Square what has arrived."""
        gradients = super().finish()
        like = next((one.like() for one in gradients if not one.zero), torch.zeros(()))
        self.squared = torch.stack([square_norms(one).to(like) for one in gradients])
        return self.squared


class BothSinks(FactorSink):
    """Hands every factor to two sinks that keep factors as they are."""

    def __init__(self, first: DotSink, second: NormSink) -> None:
        self._sinks = (first, second)

    def accumulate(self, component: int, examples: slice, left: Factor, right: Tensor) -> None:
        """Accumulate in both sinks."""
        for sink in self._sinks:
            sink.accumulate(component, examples, left, right)
