"""Algebra of factors: products of gradients `sum_t left_t (x) right_t` without hooks, files or devices."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from vestige.gradients._types import Factor, OneHot


def materialise(left: Factor, right: Float[Tensor, "example token in"]) -> Float[Tensor, "example out in"]:
    """The gradient matrix of every example, `sum_t left[e, t] (x) right[e, t]`."""
    if isinstance(left, OneHot):
        examples, _, width = right.shape
        gradient = right.new_zeros(examples, left.size, width)
        return gradient.scatter_add_(1, left.ids[:, :, None].expand(-1, -1, width), right)
    return torch.bmm(left.transpose(1, 2), right)


PRODUCT_BYTES = 64 * 2**20
"""Most bytes of gradients formed at once."""


class ReusedMemory:
    """Memory for gradients that live for one product only: fresh pages would cost a quarter of forming them."""

    def __init__(self) -> None:
        self._flat = torch.empty(0)

    def shaped(self, like: Tensor, *shape: int) -> Tensor:
        """An uninitialised tensor of `shape`, overwritten by the next call."""
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
    """Inner products of every example's gradient with given matrices, exact.

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
    """Inner products of every token's factor with every other token's, within each example."""
    if isinstance(first, OneHot) and isinstance(second, OneHot):
        return (first.ids[:, :, None] == second.ids[:, None, :]).to(torch.get_default_dtype())
    if isinstance(first, OneHot):
        assert not isinstance(second, OneHot)
        index = first.ids[:, None, :].expand(-1, second.shape[1], -1)
        return second.gather(2, index).transpose(1, 2)
    if isinstance(second, OneHot):
        return gram(second, first).transpose(1, 2)
    return torch.bmm(first, second.transpose(1, 2))


def inner_product(first: tuple[Factor, Tensor], second: tuple[Factor, Tensor]) -> Float[Tensor, "example"]:
    """Inner product of two gradients of the same example, `sum_ts (l_t . l'_s)(r_t . r'_s)`, neither one formed.

    This is the ghost identity (Wang et al. 2024, arXiv:2406.11011): `T*S*(out + in)` operations.
    """
    right = gram(first[1], second[1])
    return (gram(first[0], second[0]).to(right.dtype) * right).sum((1, 2))
