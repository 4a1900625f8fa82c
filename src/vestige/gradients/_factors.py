"""Algebra of factors: products of gradients `sum_t left_t (x) right_t` without hooks, files or devices."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

Side = Literal["left", "right"]


class OneHot(NamedTuple):
    """The left factor of an embedding: row `ids[e, t]` of an identity of `size` rows, stored as the index alone."""

    ids: Int[Tensor, "example token"]
    size: int


Factor = Float[Tensor, "example token side"] | OneHot


@runtime_checkable
class FactorSink(Protocol):
    """Receives the factors of every use of every component while forward and backward run.

    `reduce` is called as soon as a factor is known (activations during the forward pass), so that a compressor can
    shrink it before it has to be kept; what it returns is handed to `accumulate` unchanged. `accumulate` may be called
    several times for one component and one example (tied weights, a loss computed in chunks): contributions add up.
    """

    def reduce(self, component: int, side: Side, factor: Factor) -> Any:  # noqa: ARG002
        """Return what to keep of one factor of component number `component`; unless overridden, the factor itself."""
        return factor

    def accumulate(self, component: int, examples: slice, left: Any, right: Any) -> None:
        """Add the gradient `sum_t left[t] (x) right[t]` of the batch's examples in `examples`."""
        ...


@runtime_checkable
class PositionSink(FactorSink, Protocol):
    """A sink that counts tokens, and needs those of the layers that receive only some of the batch's tokens.

    Such layers are experts and the output head. The factors of every other layer have the batch's own token axis.
    """

    def locate(self, positions: Int[Tensor, "example row"]) -> None:
        """Receive the token of each row of the factors that come next, -1 for a row that only fills the tensor."""
        ...


Route = Literal["ghost", "second", "first"]
"""Factors alone; or the second, or the first, batch's gradients formed and applied to the other's factors."""


class BlockSizes:
    """How much is formed at once: other sizes change no number beyond rounding."""

    held_numbers: ClassVar[int] = 2**26
    """Most entries of formed gradients held at once (256 MiB in float32); more matrices are formed block by block."""
    product_bytes: ClassVar[int] = 64 * 2**20
    """Most bytes of gradients, or of inner products of tokens, formed for one product."""


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


def applying(piece: Extent, matrices: int, shape: Shape, *, held: int | None = None) -> int:
    """Return the operations of the inner products of a piece with formed matrices, as `dot_matrices` computes them.

    A one-hot left looks the matrix's rows up; one matrix is multiplied with the right factor; for several the piece's
    own gradients are formed first, again for every block of `held` matrices.
    """
    out, width = shape
    if piece.one_hot:
        return piece.examples * piece.tokens * matrices * width
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
    return max(1, BlockSizes.held_numbers // (shape[0] * shape[1]))


def cheapest_route(
    first: Sequence[Extent],
    second: Sequence[Extent],
    shape: Shape,
    *,
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

    `forming_share` is the part of the cost of forming the second that this batch bears: less than 1 where the matrices
    are kept for further batches, 0 where they are there already. `examples` of both sides must be given where pieces
    cover only some of them.
    """
    count, other_count = examples or (max(piece.examples for piece in side) for side in (first, second))
    held = matrices_held(shape) if forming_share == 1 else None
    costs: dict[Route, float] = {
        "ghost": sum(ghost_operations(one, other, shape) for one in first for other in second),
        "second": forming_share * sum(forming(other, shape) for other in second)
        + sum(applying(one, other_count, shape, held=held) for one in first),
        "first": sum(forming(one, shape) for one in first)
        + sum(applying(other, count, shape, held=matrices_held(shape)) for other in second),
    }
    return min(costs, key=lambda route: costs[route])


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


Pair = tuple[Tensor | OneHot, Tensor]
"""Both factors of some examples: `left [example, token, out]` (or one-hot) and `right [example, token, in]`."""


def materialise(left: Factor, right: Float[Tensor, "example token in"]) -> Float[Tensor, "example out in"]:
    """Return the gradient matrix of every example, `sum_t left[e, t] (x) right[e, t]`."""
    if isinstance(left, OneHot):
        examples, _, width = right.shape
        gradient = right.new_zeros(examples, left.size, width)
        return gradient.scatter_add_(1, left.ids[:, :, None].expand(-1, -1, width), right)
    return torch.bmm(left.transpose(1, 2), right)


def multiply_wide(
    first: Float[Tensor, "*batch row inner"], second: Float[Tensor, "*batch inner column"]
) -> Float[Tensor, "*batch row column"]:
    """Return the matrix products, at least float32: half precision is widened, so no sum loses its small terms.

    A CUDA card multiplies halves as they are and adds them up in float32, which loses nothing and is many times faster.
    """
    wide = torch.promote_types(second.dtype, torch.float32)
    multiply = torch.bmm if first.dim() == 3 else torch.mm
    # Torch has it since 2.8.
    if second.device.type == "cuda" and first.dtype == second.dtype != wide and hasattr(torch.ops.aten.bmm, "dtype"):
        return multiply(first, second, out_dtype=wide)  # type: ignore[call-overload]
    return multiply(first.to(wide), second.to(wide))


class ReusedMemory:
    """Memory for gradients that live for one product only: fresh pages would cost a quarter of forming them."""

    def __init__(self) -> None:
        self._flat = torch.empty(0)

    def give(self, like: Tensor, *shape: int) -> Tensor:
        """Return an uninitialised tensor of `shape`, overwritten by the next call."""
        size = math.prod(shape)
        if self._flat.numel() < size or self._flat.dtype != like.dtype or self._flat.device != like.device:
            self._flat = torch.empty(size, dtype=like.dtype, device=like.device)
        return self._flat[:size].view(shape)


def dot_matrices(
    left: Factor,
    right: Float[Tensor, "example token in"],
    matrices: Float[Tensor, "query out in"],
    memory: ReusedMemory,
) -> Float[Tensor, "query example"]:
    """Return the exact inner products of every example's gradient with given matrices.

    Costs `T*out*in` to form a gradient and `query*out*in` for its products; with one matrix, or an embedding's one-hot
    factor, the gradient is never formed: `sum_t left_t . (matrix @ right_t)`.
    """
    if isinstance(left, OneHot):
        return torch.stack([(matrix[left.ids] * right).sum((1, 2)) for matrix in matrices])
    if matrices.shape[0] == 1:
        return (torch.nn.functional.linear(right, matrices[0]) * left).sum((1, 2))[None]
    flat, size = matrices.flatten(1), left.shape[2] * right.shape[2]
    step = max(1, BlockSizes.product_bytes // (size * right.element_size()))
    parts = []
    for start in range(0, len(right), step):
        some = slice(start, start + step)
        gradient = memory.give(right, len(right[some]), left.shape[2], right.shape[2])
        torch.bmm(left[some].transpose(1, 2), right[some], out=gradient)
        parts.append(flat @ gradient.flatten(1).T)
    return torch.cat(parts, dim=1)


def gram(first: Factor, second: Float[Tensor, "example token2 side"] | OneHot) -> Float[Tensor, "example token token2"]:
    """Return the inner products of every token's factor with every other token's, within each example."""
    if isinstance(first, OneHot) and isinstance(second, OneHot):
        return (first.ids[:, :, None] == second.ids[:, None, :]).to(torch.get_default_dtype())
    if isinstance(first, OneHot):
        assert not isinstance(second, OneHot)
        index = first.ids[:, None, :].expand(-1, second.shape[1], -1)
        return second.gather(2, index).transpose(1, 2)
    if isinstance(second, OneHot):
        return gram(second, first).transpose(1, 2)
    return torch.bmm(first, second.transpose(1, 2))


def inner_product(first: Pair, second: Pair) -> Float[Tensor, "example"]:
    """Return the inner product of two gradients of an example, `sum_ts (l_t . l'_s)(r_t . r'_s)`, neither one formed.

    This is the ghost identity (Wang et al. 2024, arXiv:2406.11011): `T*S*(out + in)` operations.
    """
    step = max(1, BlockSizes.product_bytes // max(1, first[1].shape[1] * second[1].shape[1] * first[1].element_size()))
    parts = []
    for start in range(0, len(first[1]), step):
        (left, right), (other_left, other_right) = (some_of(one, slice(start, start + step)) for one in (first, second))
        product = gram(right, other_right)
        product = product * gram(left, other_left).to(product.dtype)
        parts.append(product.sum((1, 2), dtype=torch.promote_types(product.dtype, torch.float32)))
    return torch.cat(parts)


def extent(pair: Pair) -> Extent:
    """Return the size of a pair, for the rule of costs."""
    return Extent(pair[1].shape[0], pair[1].shape[1], isinstance(pair[0], OneHot))


def shape_of(pair: Pair) -> Shape:
    """Return `(out, in)` of the gradients."""
    left, right = pair
    return (left.size if isinstance(left, OneHot) else left.shape[2]), right.shape[2]


def some_of(pair: Pair, examples: slice) -> Pair:
    """Return the factors of some of the examples."""
    left, right = pair
    return (left._replace(ids=left.ids[examples]) if isinstance(left, OneHot) else left[examples]), right[examples]


def ghost_products(first: Pair, second: Pair) -> Float[Tensor, "example token example2"]:
    """Return the products of all pairs of examples from inner products of tokens, split over the first's tokens.

    Takes as many examples at once as `BlockSizes.product_bytes` allows.
    """
    (examples, tokens), (others, other_tokens) = first[1].shape[:2], second[1].shape[:2]
    at_once = max(1, BlockSizes.product_bytes // max(1, tokens * other_tokens * first[1].element_size()))
    step = min(others, at_once)
    rows = []
    for start in range(0, examples, max(1, at_once // step)):
        some = some_of(first, slice(start, start + max(1, at_once // step)))
        parts = [_ghost_block(some, some_of(second, slice(at, at + step))) for at in range(0, others, step)]
        rows.append(torch.cat(parts, dim=2))
    return torch.cat(rows)


def _ghost_block(first: Pair, second: Pair) -> Float[Tensor, "example token example2"]:
    right = first[1].flatten(0, 1) @ second[1].flatten(0, 1).T
    product = right * _left_products(first[0], second[0]).to(right.dtype)
    split = product.unflatten(1, second[1].shape[:2]).sum(2, dtype=torch.promote_types(right.dtype, torch.float32))
    return split.unflatten(0, first[1].shape[:2])


def _left_products(first: Tensor | OneHot, second: Tensor | OneHot) -> Float[Tensor, "row row2"]:
    """Return the inner products of all tokens of a first batch with all of a second."""
    if isinstance(first, OneHot) and isinstance(second, OneHot):
        return (first.ids.flatten()[:, None] == second.ids.flatten()[None, :]).to(torch.get_default_dtype())
    if isinstance(first, OneHot):
        assert not isinstance(second, OneHot)
        return second.flatten(0, 1)[:, first.ids.flatten()].T
    if isinstance(second, OneHot):
        return first.flatten(0, 1)[:, second.ids.flatten()]
    return first.flatten(0, 1) @ second.flatten(0, 1).T
