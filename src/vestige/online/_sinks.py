"""What a backward pass is measured by: the validation gradient, scores that stream against it, kept factors."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vestige.gradients import (
    BlockSizes,
    Factor,
    OneHot,
    ReusedMemory,
    Side,
    cross_products,
    dot_matrices,
    materialise,
)
from vestige.models import Component

_PROBES = 4
"""Parameters watched at each end of the order of sizes."""


class Piece(NamedTuple):
    """Factors of one use of a component for some of a batch's examples, in float32 at least."""

    examples: slice
    left: Factor
    right: Float[Tensor, "example token in"]


def _widen(factor: Factor) -> Factor:
    """Return the factor in float32 at least: under autocast its sides differ in type, and float16 sums badly."""
    if isinstance(factor, OneHot):
        return factor
    return factor.to(torch.promote_types(factor.dtype, torch.float32))


class FactorStore:
    """Keeps every factor of a batch by component: memory like that of the activations."""

    def __init__(self, components: int) -> None:
        self.pieces: list[list[Piece]] = [[] for _ in range(components)]

    def reduce(self, component: int, side: Side, factor: Factor) -> Factor:  # noqa: ARG002
        """Keep the factor as it is."""
        return factor

    def accumulate(self, component: int, examples: slice, left: Factor, right: Tensor) -> None:
        """Keep the piece."""
        self.pieces[component].append(Piece(examples, _widen(left), _widen(right)))  # type: ignore[arg-type]


class ValidationGradient:
    """Gradient of the validation loss, `weight` times the sum over the validation examples, ready for products.

    A component is kept as factors as long as its S tokens make products cheaper that way, `S*(out + in) < out*in`, and
    is summed into its matrix beyond. Uses of a tied weight are pieces of one sum, so their cross terms count.

    Args:
        components: What the gradient is of.
        weight: Of the sum.
        as_matrices: Sum every component into its matrix, which `precondition` multiplies.
    """

    def __init__(self, components: Sequence[Component], weight: float, *, as_matrices: bool = False) -> None:
        self._shapes = [component.shape for component in components]
        self._weight, self._as_matrices = weight, as_matrices
        self._pieces: list[list[tuple[Factor, Tensor]]] = [[] for _ in components]
        self._matrices: list[Tensor | None] = [None for _ in components]
        self._memory = ReusedMemory()

    reduce = FactorStore.reduce

    def accumulate(self, component: int, examples: slice, left: Factor, right: Tensor) -> None:  # noqa: ARG002
        """Add one use: all examples are one, whose tokens stand in a row."""
        right = _widen(right).reshape(1, -1, right.shape[-1])  # type: ignore[union-attr]
        if isinstance(left, OneHot):
            left = left._replace(ids=left.ids.reshape(1, -1))
        else:
            left = _widen(left).reshape(1, -1, left.shape[-1])  # type: ignore[union-attr]
        out, width = self._shapes[component]
        pieces, matrix = self._pieces[component], self._matrices[component]
        pieces.append((left, right))
        tokens = sum(piece[1].shape[1] for piece in pieces)
        if self._as_matrices or matrix is not None or tokens * (out + width) >= out * width:
            formed = sum((materialise(*piece)[0] for piece in pieces[1:]), materialise(*pieces[0])[0])
            self._matrices[component] = formed if matrix is None else matrix + formed
            pieces.clear()

    def precondition(self, component: int, scale: Float[Tensor, "out in"]) -> None:
        """Multiply the gradient in one component elementwise, before its products are taken."""
        matrix = self._matrices[component]
        if matrix is not None:
            self._matrices[component] = matrix * scale

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


class ScoreSink(FactorStore):
    """Inner products of each example's share of the gradient with the validation gradient, while backward runs.

    Args:
        validation: The gradient.
        components: How many there are.
        examples: In the batch.
        keep: Keep the factors, for products that need the whole step.
        late: Keep them until `take_products`, and take no product before.
    """

    def __init__(
        self,
        validation: ValidationGradient,
        components: int,
        examples: int,
        *,
        keep: bool = False,
        late: bool = False,
    ) -> None:
        super().__init__(components)
        self._validation, self._keep, self._late, self._examples = validation, keep, late, examples
        self._scores: list[Tensor | None] = [None] * components

    def accumulate(self, component: int, examples: slice, left: Factor, right: Tensor) -> None:
        """Add the products of one use of the component."""
        with torch.no_grad(), torch.autocast(right.device.type, enabled=False):
            piece = Piece(examples, _widen(left), _widen(right))  # type: ignore[arg-type]
            total = self._scores[component]
            if total is None:
                total = self._scores[component] = piece.right.new_zeros(self._examples)
            if not self._late:
                total[examples] += self._validation.products(component, piece.left, piece.right)
        if self._keep or self._late:
            self.pieces[component].append(piece)

    @torch.no_grad()
    def take_products(self) -> None:
        """Take the products that were put off until now."""
        for component, (total, pieces) in enumerate(zip(self._scores, self.pieces, strict=True)):
            for piece in pieces:
                assert total is not None
                total[piece.examples] += self._validation.products(component, piece.left, piece.right)
            if not self._keep:
                pieces.clear()

    def has_gradient(self, component: int) -> bool:
        """Return whether a gradient of the component has arrived."""
        return self._scores[component] is not None

    @property
    def scores(self) -> Float[Tensor, "component example"]:
        """Float64 on the CPU; a component that took no part has zeros."""
        device = next((row.device for row in self._scores if row is not None), torch.device("cpu"))
        zero = torch.zeros(self._examples, dtype=torch.float64, device=device)
        return torch.stack([zero if row is None else row.double() for row in self._scores]).cpu()


def products_among(
    pieces: Sequence[Piece], examples: int, scale: Float[Tensor, "out in"] | None = None
) -> Float[Tensor, "example example2"]:
    """Return inner products of all pairs of examples' gradients in one component, float64 on the CPU.

    With `scale` both gradients are multiplied by it elementwise, and have to be formed, some rows at a time.
    """
    total = torch.zeros(examples, examples, dtype=torch.float64)
    if scale is not None:
        step = max(1, BlockSizes.product_bytes // (examples * scale.shape[1] * 4))
        for rows in torch.arange(len(scale)).split(step):
            some = slice(int(rows[0]), int(rows[-1]) + 1)
            flat = (_gradient_rows(pieces, examples, some) * scale[some]).flatten(1)
            total += (flat @ flat.T).double().cpu()
        return total
    for one in pieces:
        for other in pieces:
            found = cross_products((one.left, one.right), (other.left, other.right))
            total[one.examples, other.examples] += found.double().cpu()
    return total


def _gradient_rows(pieces: Sequence[Piece], examples: int, rows: slice) -> Float[Tensor, "example row in"]:
    """Return some rows of every example's gradient in one component."""
    right = pieces[0].right
    found = right.new_zeros(examples, rows.stop - rows.start, right.shape[-1])
    for piece in pieces:
        left, right = piece.left, piece.right
        if isinstance(left, OneHot):
            inside = (left.ids >= rows.start) & (left.ids < rows.stop)
            left = OneHot(torch.where(inside, left.ids - rows.start, 0), rows.stop - rows.start)
            right = right * inside[:, :, None]
        else:
            left = left[:, :, rows].to(right.dtype)
        found[piece.examples] += materialise(left, right)
    return found


def mean_gradient(pieces: Sequence[Piece], examples: int, shape: tuple[int, int]) -> Float[Tensor, "out in"]:
    """Return the mean of the examples' gradients in one component."""
    total = pieces[0].right.new_zeros(shape)
    for piece in pieces:
        left, right = piece.left, piece.right.flatten(0, 1)
        if isinstance(left, OneHot):
            total.index_add_(0, left.ids.flatten(), right)
        else:
            total.addmm_(left.to(right.dtype).flatten(0, 1).T, right)
    return total / examples


def products_with(pieces: Sequence[Piece], matrix: Float[Tensor, "out in"], examples: int) -> Float[Tensor, "example"]:
    """Return inner products of the examples' gradients in one component with a given matrix, float64 on the CPU."""
    total, memory = torch.zeros(examples, dtype=torch.float64), ReusedMemory()
    for piece in pieces:
        given = matrix[None].to(piece.right.dtype)
        total[piece.examples] += dot_matrices(piece.left, piece.right, given, memory)[0].double().cpu()
    return total


class ScaleProbe:
    """Measures the factor by which `.grad` was multiplied after the backward pass: clipping, or undoing a loss scale.

    The norm of a few gradients is noted as soon as they are complete and compared with their norm later. Only factors
    common to all parameters are found, as `clip_grad_norm_` applies them.
    """

    def __init__(self, model: nn.Module, components: Sequence[Component]) -> None:
        names = dict.fromkeys(component.parameter for component in components)
        by_size = sorted((model.get_parameter(name) for name in names), key=lambda parameter: parameter.numel())
        self._parameters = by_size if len(by_size) < 2 * _PROBES else by_size[:_PROBES] + by_size[-_PROBES:]
        self._before: dict[int, Tensor] = {}
        self._handles: list[RemovableHandle] = [
            parameter.register_post_accumulate_grad_hook(self._note) for parameter in self._parameters
        ]

    def _note(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._before[id(parameter)] = _norm(parameter.grad)

    def note_now(self) -> None:
        """Note the gradients as they are: several processes have averaged theirs since each was complete."""
        for parameter in self._parameters:
            self._note(parameter)

    def factor(self) -> float:
        """Return the factor; one where no gradient is left to compare."""
        pairs = [
            (self._before[id(parameter)], _norm(parameter.grad))
            for parameter in self._parameters
            if parameter.grad is not None and id(parameter) in self._before
        ]
        if not pairs:
            return 1.0
        before = math.hypot(*(float(first) for first, _ in pairs))
        after = math.hypot(*(float(second) for _, second in pairs))
        if not math.isfinite(before) or before == after or before == 0:
            return 1.0
        return after / before

    def remove(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()


def _norm(gradient: Tensor) -> Tensor:
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    return torch.linalg.vector_norm(values.detach(), dtype=torch.promote_types(values.dtype, torch.float32))
