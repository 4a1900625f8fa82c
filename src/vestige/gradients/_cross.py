"""Exact inner products of the gradients of two sets of examples, by the route that costs least."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from vestige.gradients._factors import (
    Extent,
    OneHot,
    Pair,
    ReusedMemory,
    Route,
    Shape,
    cheapest_route,
    dot_matrices,
    extent,
    ghost_products,
    inner_product,
    materialise,
    matrices_held,
    own_ghost_is_cheaper,
    shape_of,
    some_of,
)


class Piece(NamedTuple):
    """The factors of one use of a component, or of one chunk of the loss, for some examples of a batch."""

    examples: slice
    left: Tensor | OneHot
    right: Tensor

    @property
    def pair(self) -> Pair:
        """The factors."""
        return self.left, self.right

    def within(self, part: slice) -> "tuple[slice, Pair] | None":
        """Return the factors of the examples in `part`, and their positions from its start; None without overlap."""
        start, stop = max(self.examples.start, part.start), min(self.examples.stop, part.stop)
        if start >= stop:
            return None
        own = slice(start - self.examples.start, stop - self.examples.start)
        return slice(start - part.start, stop - part.start), some_of(self.pair, own)


class Gradients(NamedTuple):
    """Gradients of one component for some examples: the sum of their pieces, or given as matrices, or both.

    Without either they are zero, as those of an expert that no token was sent to.
    """

    examples: int
    shape: Shape
    pieces: tuple[Piece, ...] = ()
    matrices: Float[Tensor, "example out in"] | None = None

    @property
    def extents(self) -> list[Extent]:
        """The sizes of the pieces, for the rule of costs."""
        return [extent(piece.pair) for piece in self.pieces]

    @property
    def zero(self) -> bool:
        """Return whether nothing has contributed."""
        return not self.pieces and self.matrices is None

    def like(self) -> Tensor:
        """Return a tensor of the same kind, at least float32, as products are."""
        tensor = self.pieces[0].right if self.matrices is None else self.matrices
        return tensor.new_zeros((), dtype=torch.promote_types(tensor.dtype, torch.float32))


def gradients_of(pair: Pair) -> Gradients:
    """Return the gradients of one pair of factors."""
    count = len(pair[1])
    return Gradients(count, shape_of(pair), (Piece(slice(0, count), *pair),))


def matrices_of(gradients: Gradients, part: slice) -> Float[Tensor, "example out in"]:
    """Return the gradient matrices of the examples in `part`."""
    if gradients.matrices is not None:
        return gradients.matrices[part]
    found = [inside for piece in gradients.pieces if (inside := piece.within(part)) is not None]
    if len(found) == 1 and found[0][0] == slice(0, part.stop - part.start):
        return materialise(*found[0][1])
    total = gradients.pieces[0].right.new_zeros(part.stop - part.start, *gradients.shape)
    for places, pair in found:
        total[places] += materialise(*pair)
    return total


def products(first: Gradients, second: Gradients) -> Float[Tensor, "example example2"]:
    """Return the inner products of all gradients of `first` with all of `second`, cross terms of pieces included."""
    if first.zero or second.zero:
        seen = next((side.like() for side in (first, second) if not side.zero), torch.zeros(()))
        return seen.new_zeros(first.examples, second.examples)
    route = _route(first, second)
    if route == "second":
        return _apply(first, second)
    if route == "first":
        return _apply(second, first).T
    total = first.like().new_zeros(first.examples, second.examples)
    for one in first.pieces:
        for other in second.pieces:
            total[one.examples, other.examples] += ghost_products(one.pair, other.pair).sum(1)
    return total


def square_norms(gradients: Gradients) -> Float[Tensor, "example"]:
    """Return the squared length of every gradient, cross terms of the pieces included."""
    total = gradients.like().new_zeros(gradients.examples) if not gradients.zero else torch.zeros(gradients.examples)
    if gradients.matrices is None and gradients.pieces and own_ghost_is_cheaper(gradients.extents, gradients.shape):
        for place, one in enumerate(gradients.pieces):
            _add_own(total, one, one, 1)
            for other in gradients.pieces[place + 1 :]:
                _add_own(total, one, other, 2)
    elif not gradients.zero:
        for part in _parts(gradients):
            total[part] = matrices_of(gradients, part).flatten(1).to(total.dtype).square().sum(1)
    return total


def cross_products(first: Pair, second: Pair) -> Float[Tensor, "example example2"]:
    """Return the inner products of all gradients of a first batch with all of a second, `[example, example2]`.

    `first` and `second` are the `(left, right)` of one component as a sink receives them: `[example, token, out]` with
    `[example, token, in]`, and `[example2, token2, out]` with `[example2, token2, in]`; `left` may be `OneHot` on
    either side or both. Batches and lengths may differ. Exact; float32 at least.

    Takes the cheapest route (`cheapest_route`): the ghost identity `sum_ts (l_t . l'_s)(r_t . r'_s)` (Wang et al. 2024,
    arXiv:2406.11011), or the gradients of one side formed, block by block, and applied to the other.

    The gradient of a tied weight, or of a loss in chunks, is a *sum* of such pairs: add the products of every pair of
    the first with every pair of the second, or use `products`, which does.
    """
    return products(gradients_of(first), gradients_of(second))


def _route(first: Gradients, second: Gradients) -> Route:
    """Return the cheapest route; given matrices cost nothing to form, and factors that are not given cannot be used."""
    if not second.pieces:
        return "second"
    if not first.pieces:
        return "first"
    return route_between(first, second, 1.0 if second.matrices is None else 0.0)


def route_between(first: Gradients, second: Gradients, forming_share: float) -> Route:
    """Return `cheapest_route` for gradients that both have factors."""
    return cheapest_route(
        first.extents,
        second.extents,
        first.shape,
        forming_share=forming_share,
        examples=(first.examples, second.examples),
    )


def _apply(first: Gradients, second: Gradients) -> Float[Tensor, "example example2"]:
    """Return the products with the second's matrices, formed block by block where they are not given."""
    total, memory = second.like().new_zeros(second.examples, first.examples), ReusedMemory()
    parts: Sequence[slice] = [slice(0, second.examples)] if second.matrices is not None else list(_parts(second))
    for part in parts:
        matrices = matrices_of(second, part)
        if not first.pieces:
            assert first.matrices is not None
            total[part] = matrices.flatten(1) @ first.matrices.flatten(1).T
        for piece in first.pieces:
            found = dot_matrices(piece.left, piece.right, matrices.to(piece.right.dtype), memory)
            total[part, piece.examples] += found.to(total.dtype)
    return total.T


def _parts(gradients: Gradients) -> Iterator[slice]:
    """Yield slices of as many examples as formed gradients may be held at once."""
    step = matrices_held(gradients.shape)
    for start in range(0, gradients.examples, step):
        yield slice(start, min(start + step, gradients.examples))


def _add_own(total: Tensor, one: Piece, other: Piece, times: int) -> None:
    """Add the products of two pieces of the same examples."""
    mine, theirs = one.within(other.examples), other.within(one.examples)
    if mine is not None and theirs is not None:
        start = max(one.examples.start, other.examples.start)
        found = inner_product(mine[1], theirs[1])
        total[start : start + len(found)] += times * found.to(total.dtype)


def numbers(gradients: Gradients) -> int:
    """Return how many numbers keeping these gradients takes."""
    held = 0 if gradients.matrices is None else gradients.matrices.numel()
    return held + sum(
        piece.right.numel() + (piece.left.ids if isinstance(piece.left, OneHot) else piece.left).numel()
        for piece in gradients.pieces
    )


def count_formed(gradients: Gradients) -> int:
    """Return how many numbers the matrices of these gradients take."""
    return gradients.examples * math.prod(gradients.shape)


FORMED_BYTES_AT_MOST = 2**30
"""Most bytes of matrices that are formed from factors and kept."""


class FormingBudget:
    """Memory for formed matrices, shared by all components."""

    def __init__(self, size: int = FORMED_BYTES_AT_MOST) -> None:
        self._left = size

    def take(self, size: int) -> bool:
        """Reserve that many bytes if they are free, and return whether they were."""
        fits = size <= self._left
        self._left -= size if fits else 0
        return fits


class HeldGradients:
    """One component's gradients, kept as factors until forming their matrices is cheaper for the batches to come.

    `batches` is how many batches are expected: the cost of forming is shared between them.
    """

    def __init__(self, gradients: Gradients, budget: FormingBudget, batches: int = 1) -> None:
        self._gradients, self._budget, self._batches = gradients, budget, max(batches, 1)

    @property
    def formed(self) -> bool:
        """Return whether matrices are at hand."""
        return self._gradients.matrices is not None

    def products(self, first: Gradients) -> Float[Tensor, "example held"]:
        """Return the inner products of a batch's gradients with these."""
        if self._pays(first):
            matrices = matrices_of(self._gradients, slice(0, self._gradients.examples))
            self._gradients = self._gradients._replace(matrices=matrices)
        return products(first, self._gradients)

    def _pays(self, first: Gradients) -> bool:
        mine = self._gradients
        if self.formed or not mine.pieces or not first.pieces:
            return False
        if route_between(first, mine, 1 / self._batches) != "second":
            return False
        return self._budget.take(count_formed(mine) * mine.pieces[0].right.element_size())


class LowRank(NamedTuple):
    """Matrices as a sum of a few outer products."""

    gradients: Gradients
    kept: Float[Tensor, "query"]
    """Share of each matrix's squared length that is left."""


def low_rank(matrices: Float[Tensor, "query out in"], rank: int) -> LowRank:
    """Return the closest matrices of that rank (truncated singular value decomposition), as factors of `rank` tokens.

    Exact, up to rounding, where the rank is not below that of the matrix; a gradient summed over T tokens has at most
    rank T. Where the factors would be no smaller than the matrices, these are kept as they are.

    The singular vectors of the shorter side are the eigenvectors of `G G^T`, found in float64 so that squaring costs no
    digits of float32: several times faster than a decomposition of G. About `out*in*min(out, in)` operations for each
    matrix, whatever the number of training examples.
    """
    count, out, width = matrices.shape
    if rank * (out + width) >= out * width:
        return LowRank(Gradients(count, (out, width), matrices=matrices), matrices.new_ones(count))
    pairs = [_project(matrix.double(), rank) for matrix in matrices]
    left, right = (torch.stack(side) for side in zip(*pairs, strict=True))
    squared = matrices.double().flatten(1).square().sum(1)
    kept = right.square().sum((1, 2)) if out <= width else left.square().sum((1, 2))
    wide = torch.promote_types(matrices.dtype, torch.float32)
    piece = Piece(slice(0, count), left.to(wide), right.to(wide))
    share = (kept / squared.clamp(min=torch.finfo(torch.float64).tiny)).to(wide)
    return LowRank(Gradients(count, (out, width), (piece,)), share)


def _project(matrix: Float[Tensor, "out in"], rank: int) -> tuple[Float[Tensor, "rank out"], Float[Tensor, "rank in"]]:
    """Return factors of the matrix projected on the leading eigenvectors of its shorter side."""
    if matrix.shape[0] > matrix.shape[1]:
        right, left = _project(matrix.T, rank)
        return left, right
    leading = torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, -rank:].T
    return leading, leading @ matrix
