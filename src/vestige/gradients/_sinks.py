"""Sinks that need no compression: whole gradients, exact inner products and exact norms."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vestige.gradients._factors import ReusedMemory, dot_matrices, inner_product, materialise
from vestige.gradients._types import Factor, Side
from vestige.models import Component


class GradientSink:
    """Keeps every example's whole gradient, one `[example, out, in]` tensor per component.

    Costs `examples * parameters` numbers: for queries and for tests.
    """

    def __init__(self, components: Sequence[Component]) -> None:
        self._shapes = [component.shape for component in components]
        self.gradients: list[Tensor] = []

    def begin(self, examples: int, device: torch.device | str, dtype: torch.dtype = torch.float32) -> None:
        """Start a batch with zeros."""
        self.gradients = [torch.zeros(examples, *shape, device=device, dtype=dtype) for shape in self._shapes]

    def reduce(self, component: int, side: Side, factor: Factor) -> Factor:  # noqa: ARG002
        """Keep the factor as it is."""
        return factor

    def accumulate(self, component: int, examples: slice, left: Factor, right: Tensor) -> None:
        """Add the gradient matrix."""
        self.gradients[component][examples] += materialise(left, right).to(self.gradients[component].dtype)


class DotSink:
    """Exact inner products of each example's gradient with given vectors, per component.

    `vectors[c]` is `[query, out, in]` for component `c`. `scores` is `[component, query, example]`; its sum over
    components is the inner product of the whole gradients.
    """

    def __init__(self, vectors: Sequence[Float[Tensor, "query _out _in"]]) -> None:
        self._vectors = list(vectors)
        self._memory = ReusedMemory()
        self.scores = torch.zeros(0)

    def begin(self, examples: int) -> None:
        """Start a batch with zeros."""
        first = self._vectors[0]
        shape = (len(self._vectors), first.shape[0], examples)
        self.scores = torch.zeros(shape, device=first.device, dtype=torch.promote_types(first.dtype, torch.float32))

    def reduce(self, component: int, side: Side, factor: Factor) -> Factor:  # noqa: ARG002
        """Keep the factor as it is."""
        return factor

    def accumulate(self, component: int, examples: slice, left: Factor, right: Tensor) -> None:
        """Add the inner products of one use of the component."""
        vectors = self._vectors[component].to(right.dtype)
        self.scores[component, :, examples] += dot_matrices(left, right, vectors, self._memory).to(self.scores.dtype)


class NormSink:
    """Exact squared norm of each example's gradient, per component: `squared` is `[component, example]`.

    The uses of a tied weight and the chunks of a loss are pieces of one gradient, so their cross terms count: all
    pieces are kept until `finish`.
    """

    def __init__(self, components: Sequence[Component]) -> None:
        self._components = list(components)
        self._pieces: list[list[tuple[slice, Factor, Tensor]]] = []
        self._examples = 0
        self.squared = torch.zeros(0)

    def begin(self, examples: int) -> None:
        """Start a batch."""
        self._examples = examples
        self._pieces = [[] for _ in self._components]

    def reduce(self, component: int, side: Side, factor: Factor) -> Factor:  # noqa: ARG002
        """Keep the factor as it is."""
        return factor

    def accumulate(self, component: int, examples: slice, left: Factor, right: Any) -> None:
        """Keep the piece; a lone whole-batch piece of a singly used component is squared at once in `finish`."""
        self._pieces[component].append((examples, left, right))

    def finish(self) -> Float[Tensor, "component example"]:
        """Square what has arrived: ghost products where tokens are few, the matrix itself where they are many."""
        seen = next((pieces[0][2] for pieces in self._pieces if pieces), torch.zeros(0))
        rows = [
            # A component that took no part (an expert that no token was sent to) has no gradient.
            self._square(component, pieces) if pieces else seen.new_zeros(self._examples)
            for component, pieces in zip(self._components, self._pieces, strict=True)
        ]
        self._pieces = []
        self.squared = torch.stack(rows)
        return self.squared

    def _square(self, component: Component, pieces: list[tuple[slice, Factor, Tensor]]) -> Tensor:
        if len(pieces) == 1 and pieces[0][0] == slice(0, self._examples):
            _, left, right = pieces[0]
            if right.shape[1] * sum(component.shape) < component.size:
                return inner_product((left, right), (left, right))
            return materialise(left, right).flatten(1).square().sum(1)
        gradient = pieces[0][2].new_zeros(self._examples, *component.shape)
        for examples, left, right in pieces:
            gradient[examples] += materialise(left, right)
        return gradient.flatten(1).square().sum(1)


class BothSinks:
    """Hands every factor to two sinks that keep factors as they are."""

    def __init__(self, first: DotSink, second: NormSink) -> None:
        self._sinks = (first, second)

    def reduce(self, component: int, side: Side, factor: Factor) -> Factor:  # noqa: ARG002
        """Keep the factor as it is."""
        return factor

    def accumulate(self, component: int, examples: slice, left: Factor, right: Tensor) -> None:
        """Both add their share."""
        for sink in self._sinks:
            sink.accumulate(component, examples, left, right)
