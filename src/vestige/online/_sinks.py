"""Sinks of the online engine: the validation gradient, the scores that stream against it, factors kept for later."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from vestige.gradients import Factor, OneHot, ReusedMemory, Side, cross_products, dot_matrices, materialise
from vestige.models import Component


class Piece(NamedTuple):
    """Factors of one use of a component for some of a batch's examples; `wide`, so float32 at least."""

    examples: slice
    left: Factor
    right: Float[Tensor, "example token in"]


def wide(factor: Factor) -> Factor:
    """Return the factor in float32 at least: under autocast its sides differ in type, and float16 sums badly."""
    if isinstance(factor, OneHot):
        return factor
    return factor.to(torch.promote_types(factor.dtype, torch.float32))


class ValidationGradient:
    """Gradient of the validation loss, `weight` times the sum over the validation examples, ready for products.

    A component is kept as factors as long as its S tokens make products cheaper that way, `S*(out + in) < out*in`, and
    is summed into its matrix beyond. Uses of a tied weight are pieces of one sum, so their cross terms count.
    """

    def __init__(self, components: Sequence[Component], weight: float) -> None:
        self._shapes = [component.shape for component in components]
        self._weight = weight
        self._pieces: list[list[tuple[Factor, Tensor]]] = [[] for _ in components]
        self._matrices: list[Tensor | None] = [None for _ in components]
        self._memory = ReusedMemory()

    def reduce(self, component: int, side: Side, factor: Factor) -> Factor:  # noqa: ARG002
        """Keep the factor as it is."""
        return factor

    def accumulate(self, component: int, examples: slice, left: Factor, right: Tensor) -> None:  # noqa: ARG002
        """Add one use: all examples are one, whose tokens stand in a row."""
        right = wide(right).reshape(1, -1, right.shape[-1])  # type: ignore[union-attr]
        left = left._replace(ids=left.ids.reshape(1, -1)) if isinstance(left, OneHot) else wide(left)
        if not isinstance(left, OneHot):
            left = left.reshape(1, -1, left.shape[-1])
        out, width = self._shapes[component]
        pieces, matrix = self._pieces[component], self._matrices[component]
        pieces.append((left, right))
        tokens = sum(piece[1].shape[1] for piece in pieces)
        if matrix is not None or tokens * (out + width) >= out * width:
            formed = sum((materialise(*piece)[0] for piece in pieces[1:]), materialise(*pieces[0])[0])
            self._matrices[component] = formed if matrix is None else matrix + formed
            pieces.clear()

    def products(self, component: int, left: Factor, right: Tensor) -> Float[Tensor, "example"]:
        """Return inner products of the examples' gradients with this one, in one component."""
        matrix = self._matrices[component]
        if matrix is not None:
            return self._weight * dot_matrices(left, right, matrix[None].to(right.dtype), self._memory)[0]
        total = right.new_zeros(right.shape[0])
        for other_left, other_right in self._pieces[component]:
            second = other_left if isinstance(other_left, OneHot) else other_left.to(right.dtype)
            total = total + cross_products((left, right), (second, other_right.to(right.dtype)))[:, 0]
        return self._weight * total


class ScoreSink:
    """Inner products of each example's share of the gradient with the validation gradient, while backward runs.

    `scores` is `[component, example]`. With `keep` the factors stay, for products that need the whole step.
    """

    def __init__(self, validation: ValidationGradient, components: int, examples: int, *, keep: bool = False) -> None:
        self._validation, self._keep = validation, keep
        self._scores: list[Tensor | None] = [None] * components
        self._examples = examples
        self.pieces: list[list[Piece]] = [[] for _ in range(components)]
        self.deliveries = 0

    def reduce(self, component: int, side: Side, factor: Factor) -> Factor:  # noqa: ARG002
        """Keep the factor as it is."""
        return factor

    def accumulate(self, component: int, examples: slice, left: Factor, right: Tensor) -> None:
        """Add the products of one use of the component."""
        with torch.no_grad(), torch.autocast(right.device.type, enabled=False):
            piece = Piece(examples, wide(left), wide(right))  # type: ignore[arg-type]
            products = self._validation.products(component, piece.left, piece.right)
            total = self._scores[component]
            if total is None:
                total = self._scores[component] = products.new_zeros(self._examples)
            total[examples] += products
        self.deliveries += 1
        if self._keep:
            self.pieces[component].append(piece)

    def delivered(self, component: int) -> bool:
        """Return whether a gradient of the component has arrived."""
        return self._scores[component] is not None

    @property
    def scores(self) -> Float[Tensor, "component example"]:
        """Float64 on the CPU; a component that took no part has zeros."""
        device = next((row.device for row in self._scores if row is not None), torch.device("cpu"))
        zero = torch.zeros(self._examples, dtype=torch.float64, device=device)
        return torch.stack([zero if row is None else row.double() for row in self._scores]).cpu()


class FactorStore:
    """Keeps every factor of a batch: memory like that of the activations."""

    def __init__(self, components: Sequence[Component]) -> None:
        self.pieces: list[list[Piece]] = [[] for _ in components]

    def reduce(self, component: int, side: Side, factor: Factor) -> Factor:  # noqa: ARG002
        """Keep the factor as it is."""
        return factor

    def accumulate(self, component: int, examples: slice, left: Factor, right: Tensor) -> None:
        """Keep the piece."""
        self.pieces[component].append(Piece(examples, wide(left), wide(right)))  # type: ignore[arg-type]


def products_among(pieces: Sequence[Sequence[Piece]], examples: int) -> Float[Tensor, "example example2"]:
    """Return inner products of all pairs of examples' gradients, summed over components, float64 on the CPU."""
    total = torch.zeros(examples, examples, dtype=torch.float64)
    for component in pieces:
        for one in component:
            for other in component:
                found = cross_products((one.left, one.right), (other.left, other.right))
                total[one.examples, other.examples] += found.double().cpu()
    return total


def products_with(pieces: Sequence[Piece], matrix: Float[Tensor, "out in"], examples: int) -> Float[Tensor, "example"]:
    """Return inner products of the examples' gradients in one component with a given matrix, float64 on the CPU."""
    total, memory = torch.zeros(examples, dtype=torch.float64), ReusedMemory()
    for piece in pieces:
        given = matrix[None].to(piece.right.dtype)
        total[piece.examples] += dot_matrices(piece.left, piece.right, given, memory)[0].double().cpu()
    return total
