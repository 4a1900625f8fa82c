"""Algebra of factors: products of gradients `sum_t left_t (x) right_t` without hooks, files or devices."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from vestige.gradients._cost import Extent, Shape
from vestige.gradients._types import Factor, OneHot

Pair = tuple[Tensor | OneHot, Tensor]
"""Both factors of some examples: `left [example, token, out]` (or one-hot) and `right [example, token, in]`."""


def materialise(left: Factor, right: Float[Tensor, "example token in"]) -> Float[Tensor, "example out in"]:
    """Return the gradient matrix of every example, `sum_t left[e, t] (x) right[e, t]`."""
    if isinstance(left, OneHot):
        examples, _, width = right.shape
        gradient = right.new_zeros(examples, left.size, width)
        return gradient.scatter_add_(1, left.ids[:, :, None].expand(-1, -1, width), right)
    return torch.bmm(left.transpose(1, 2), right)


PRODUCT_BYTES = 64 * 2**20
"""Most bytes of gradients, or of inner products of tokens, formed for one product."""


class ReusedMemory:
    """Memory for gradients that live for one product only: fresh pages would cost a quarter of forming them."""

    def __init__(self) -> None:
        self._flat = torch.empty(0)

    def shaped(self, like: Tensor, *shape: int) -> Tensor:
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
    step = max(1, PRODUCT_BYTES // (size * right.element_size()))
    parts = []
    for start in range(0, len(right), step):
        some = slice(start, start + step)
        gradient = memory.shaped(right, len(right[some]), left.shape[2], right.shape[2])
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
    step = max(1, PRODUCT_BYTES // max(1, first[1].shape[1] * second[1].shape[1] * first[1].element_size()))
    parts = []
    for start in range(0, len(first[1]), step):
        (left, right), (other_left, other_right) = (some_of(one, slice(start, start + step)) for one in (first, second))
        product = gram(right, other_right)
        product = product * gram(left, other_left).to(product.dtype)
        parts.append(product.sum((1, 2), dtype=torch.promote_types(product.dtype, torch.float32)))
    return torch.cat(parts)


def dot_matrices_by_token(
    left: Factor, right: Float[Tensor, "example token in"], matrices: Float[Tensor, "query out in"]
) -> Float[Tensor, "query example token"]:
    """Split `dot_matrices` over tokens: `left_t . (matrix @ right_t)`; no gradient is formed."""
    wide = torch.promote_types(right.dtype, torch.float32)
    if isinstance(left, OneHot):
        return torch.stack([(matrix[left.ids] * right).sum(2, dtype=wide) for matrix in matrices])
    return torch.stack([(torch.nn.functional.linear(right, matrix) * left).sum(2, dtype=wide) for matrix in matrices])


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

    Takes as many examples at once as `PRODUCT_BYTES` allows.
    """
    (examples, tokens), (others, other_tokens) = first[1].shape[:2], second[1].shape[:2]
    at_once = max(1, PRODUCT_BYTES // max(1, tokens * other_tokens * first[1].element_size()))
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
