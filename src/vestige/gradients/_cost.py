"""The cost of an exact product of gradients, from factors and from matrices: the one rule that chooses between them.

Operations are multiplications with their additions (half of what is usually called FLOP), of matrix products and
look-ups alike; element-wise work, `1/(out + in)` of the rest, is left out.
"""

from collections.abc import Sequence
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
    """Return the operations that form a piece's gradient matrices: `T*out*in` an example, `T*in` for a one-hot left."""
    out, width = shape
    return piece.examples * piece.tokens * width * (1 if piece.one_hot else out)


def applying(piece: Extent, matrices: int, shape: Shape, *, by_token: bool = False, held: int | None = None) -> int:
    """Return the operations of the inner products of a piece with formed matrices, as `dot_matrices` computes them.

    A one-hot left looks the matrix's rows up; one matrix (or a score for each token) is multiplied with the right
    factor; for several the piece's own gradients are formed first, again for every block of `held` matrices.
    """
    out, width = shape
    if piece.one_hot:
        return piece.examples * piece.tokens * matrices * width
    if by_token:
        return piece.examples * piece.tokens * matrices * out * width
    if held is not None and matrices > held:
        whole, rest = divmod(matrices, held)
        return whole * applying(piece, held, shape) + (applying(piece, rest, shape) if rest else 0)
    if matrices == 1:
        return forming(piece, shape)
    return forming(piece, shape) + piece.examples * matrices * out * width


def ghost_operations(first: Extent, second: Extent, shape: Shape) -> int:
    """Return the operations of `sum_ts (l_t . l'_s)(r_t . r'_s)` for all pairs of examples; a one-hot left is free."""
    out, width = shape
    pairs = first.examples * first.tokens * second.examples * second.tokens
    return pairs * (width if first.one_hot or second.one_hot else out + width)


def matrices_held(shape: Shape) -> int:
    """Return the number of gradients of that shape that are formed at once."""
    return max(1, HELD_NUMBERS // (shape[0] * shape[1]))


def cheapest_route(
    first: Sequence[Extent],
    second: Sequence[Extent],
    shape: Shape,
    *,
    by_token: bool = False,
    forming_share: float = 1.0,
    examples: tuple[int, int] | None = None,
) -> Route:
    """Return the route with the fewest operations for the products of two batches, each the sum of its pieces.

    For one dense piece a side, of B1 examples with T tokens and B2 with S, the ghost identity needs two inner products
    of length `out` and `in` for every pair of tokens, and matrices have to be formed on both sides before every pair of
    examples costs one inner product of length `out*in`:

        ghost      B1*B2*T*S*(out + in)
        matrices   (B1*T + B2*S)*out*in + B1*B2*out*in

    Divided by B1*B2: ghost products win while `T*S*(out + in) < out*in*(1 + T/B2 + S/B1)`: few tokens and wide layers,
    short queries above all. Where a side has a single example, or a one-hot left, it need not be formed (`applying`),
    so which side is formed matters too. Pieces of a sum (a tied weight, a loss in chunks) multiply: every piece of the
    first meets every piece of the second, while matrices are summed before they are used.

    With `by_token` the products stay split over the first batch's tokens, so its gradients are never formed.
    `forming_share` is the part of the cost of forming the second that this batch bears: less than 1 where the matrices
    are kept for further batches, 0 where they are there already. `examples` of both sides must be given where pieces
    cover only some of them.
    """
    count, other_count = examples or (max(piece.examples for piece in side) for side in (first, second))
    held = matrices_held(shape) if forming_share == 1 else None
    costs: dict[Route, float] = {
        "ghost": sum(ghost_operations(one, other, shape) for one in first for other in second),
        "second": forming_share * sum(forming(other, shape) for other in second)
        + sum(applying(one, other_count, shape, by_token=by_token, held=held) for one in first),
    }
    if not by_token:
        costs["first"] = sum(forming(one, shape) for one in first) + sum(
            applying(other, count, shape, held=matrices_held(shape)) for other in second
        )
    return min(costs, key=lambda route: costs[route])


def ghost_is_cheaper(first: Extent, second: Extent, shape: Shape, *, by_token: bool = False) -> bool:
    """Return whether factors alone need the fewest operations, for one piece a side; derivation in `cheapest_route`."""
    return cheapest_route((first,), (second,), shape, by_token=by_token) == "ghost"


def own_ghost_is_cheaper(pieces: Sequence[Extent], shape: Shape) -> bool:
    """Return whether squared norms cost least from factors: an example meets only itself, `T*T*(out + in)` operations.

    A matrix costs `T*out*in` to form and `out*in` to square, so ghost norms win while about `T < out*in/(out + in)`.
    Pieces of a sum meet each other once (both orders are equal).
    """
    examples = max(piece.examples for piece in pieces)
    ghost = sum(
        ghost_operations(Extent(1, one.tokens, one.one_hot), other, shape)
        for place, one in enumerate(pieces)
        for other in pieces[place:]
    )
    return ghost < sum(forming(piece, shape) for piece in pieces) + examples * shape[0] * shape[1]
