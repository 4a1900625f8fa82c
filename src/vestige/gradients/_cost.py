"""What an exact product of gradients costs, from factors and from matrices: the one rule that chooses between them.

Operations are multiplications with their additions (half of what is usually called FLOP), of matrix products and
look-ups alike; element-wise work, `1/(out + in)` of the rest, is left out.
"""

from typing import Literal, NamedTuple

Route = Literal["ghost", "second", "first"]
"""Factors alone; or the second, or the first, batch's gradients formed and applied to the other's factors."""

HELD_NUMBERS = 2**26
"""Most entries of formed gradients held at once (256 MiB in float32); more matrices are formed block by block."""


class Extent(NamedTuple):
    """The size of one piece of the factors of a batch."""

    examples: int
    tokens: int
    one_hot: bool = False


Shape = tuple[int, int]


def forming(piece: Extent, shape: Shape) -> int:
    """Operations that form the gradient matrices of a piece: `T*out*in` an example, `T*in` where left is one-hot."""
    out, width = shape
    return piece.examples * piece.tokens * width * (1 if piece.one_hot else out)


def applying(piece: Extent, matrices: int, shape: Shape, *, by_token: bool = False) -> int:
    """Operations of the inner products of a piece with formed matrices, as `dot_matrices` does them.

    A one-hot left looks the matrix's rows up; one matrix (or a score for each token) is multiplied with the right
    factor; for several the piece's own gradients are formed first, once for every block of matrices held.
    """
    out, width = shape
    if piece.one_hot:
        return piece.examples * piece.tokens * matrices * width
    if by_token:
        return piece.examples * piece.tokens * matrices * out * width
    held = matrices_held(shape)
    if matrices > held:
        whole, rest = divmod(matrices, held)
        return whole * applying(piece, held, shape) + (applying(piece, rest, shape) if rest else 0)
    if matrices == 1:
        return forming(piece, shape)
    return forming(piece, shape) + piece.examples * matrices * out * width


def ghost_operations(first: Extent, second: Extent, shape: Shape) -> int:
    """Operations of `sum_ts (l_t . l'_s)(r_t . r'_s)` for all pairs of examples; a one-hot left costs nothing."""
    out, width = shape
    pairs = first.examples * first.tokens * second.examples * second.tokens
    return pairs * (width if first.one_hot or second.one_hot else out + width)


def matrices_held(shape: Shape) -> int:
    """How many gradients of that shape are formed at once."""
    return max(1, HELD_NUMBERS // (shape[0] * shape[1]))


def cheapest_route(
    first: tuple[Extent, ...], second: tuple[Extent, ...], shape: Shape, *, by_token: bool = False
) -> Route:
    """The route with the fewest operations for the products of two batches, each the sum of its pieces.

    For one dense piece a side, of B1 examples with T tokens and B2 with S, the ghost identity needs two inner products
    of length `out` and `in` for every pair of tokens, and matrices have to be formed on both sides before every pair of
    examples costs one inner product of length `out*in`:

        ghost      B1*B2*T*S*(out + in)
        matrices   (B1*T + B2*S)*out*in + B1*B2*out*in

    Ghost products win while, for large batches, `T*S*(out + in) < out*in`: few tokens and wide layers, short queries
    above all. Where a side has a single example, or a one-hot left, it need not be formed (`applying`), so which side
    is formed matters too. Pieces of a sum (a tied weight, a loss in chunks) multiply: every piece of the first meets
    every piece of the second, while matrices are summed before they are used.

    With `by_token` the products stay split over the first batch's tokens, so its gradients are never formed.
    """
    first_count, second_count = (max(piece.examples for piece in side) for side in (first, second))
    costs: dict[Route, int] = {
        "ghost": sum(ghost_operations(one, other, shape) for one in first for other in second),
        "second": sum(forming(other, shape) for other in second)
        + sum(applying(one, second_count, shape, by_token=by_token) for one in first),
    }
    if not by_token:
        costs["first"] = sum(forming(one, shape) for one in first) + sum(
            applying(other, first_count, shape) for other in second
        )
    return min(costs, key=lambda route: costs[route])


def ghost_is_cheaper(first: Extent, second: Extent, shape: Shape, *, by_token: bool = False) -> bool:
    """Whether factors alone need the fewest operations, for one piece a side; derivation in `cheapest_route`."""
    return cheapest_route((first,), (second,), shape, by_token=by_token) == "ghost"
