"""Gradients that many batches are multiplied with: their matrices are formed once, and only where that pays."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from vestige.gradients._cross import Gradients, Piece, formed_numbers, matrices_of, products, route_between

ROOM_BYTES = 2**30
"""Most bytes of matrices that are formed from factors and kept."""


class Room:
    """Memory for formed matrices, shared by all components."""

    def __init__(self, size: int = ROOM_BYTES) -> None:
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

    def __init__(self, gradients: Gradients, room: Room, batches: int = 1) -> None:
        self._gradients, self._room, self._batches = gradients, room, max(batches, 1)

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
        return self._room.take(formed_numbers(mine) * mine.pieces[0].right.element_size())


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
    pairs = [_projected(matrix.double(), rank) for matrix in matrices]
    left, right = (torch.stack(side) for side in zip(*pairs, strict=True))
    squared = matrices.double().flatten(1).square().sum(1)
    kept = right.square().sum((1, 2)) if out <= width else left.square().sum((1, 2))
    wide = torch.promote_types(matrices.dtype, torch.float32)
    piece = Piece(slice(0, count), left.to(wide), right.to(wide))
    share = (kept / squared.clamp(min=torch.finfo(torch.float64).tiny)).to(wide)
    return LowRank(Gradients(count, (out, width), (piece,)), share)


def _projected(
    matrix: Float[Tensor, "out in"], rank: int
) -> tuple[Float[Tensor, "rank out"], Float[Tensor, "rank in"]]:
    """Return factors of the matrix projected on the leading eigenvectors of its shorter side."""
    if matrix.shape[0] > matrix.shape[1]:
        right, left = _projected(matrix.T, rank)
        return left, right
    leading = torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, -rank:].T
    return leading, leading @ matrix


def held(vectors: Sequence[Tensor | Gradients], batches: int = 1) -> list[HeldGradients]:
    """Return the gradients that a `DotSink` takes, for every component."""
    memory = Room()
    return [
        HeldGradients(
            one if isinstance(one, Gradients) else Gradients(len(one), (one.shape[1], one.shape[2]), matrices=one),
            memory,
            batches,
        )
        for one in vectors
    ]
