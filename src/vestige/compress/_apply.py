"""Compressed gradients from factors, without the gradient where that is cheaper."""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vestige.compress._coordinates import Coordinates
from vestige.compress._identity import Composed, Identity
from vestige.compress._streamed import circular, entrywise, is_mapped_late
from vestige.compress._tensorsketch import Wrap
from vestige.compress._types import Compressor, LinearMap
from vestige.gradients import Factor, OneHot, Side

# The two factors of one gradient have sides of different lengths, which one axis name cannot express.
LeftFactor = Float[Tensor, "example token left"] | OneHot
RightFactor = Float[Tensor, "example token right"] | OneHot
ReducedFactor = Float[Tensor, "example token kept"] | OneHot

PRODUCT_BYTES = 256 * 2**20  # products of this size at most are formed at once
# One kept entry of a mask costs two gathered numbers per token, one entry of the full product a multiply-add
# in a matrix product: 45 to 90 times less on a CPU core.
_GATHER_COST = 45


def compress_factors(compressor: Compressor, left: LeftFactor, right: RightFactor) -> Float[Tensor, "example size"]:
    """Return the compressed gradient `sum_t left[t] (x) right[t]` of each example, float32."""
    return combine(compressor, reduce_factor(compressor, "left", left), reduce_factor(compressor, "right", right))


def reduce_factor(compressor: Compressor, side: Side, factor: Factor) -> ReducedFactor:
    """Return what has to be kept of one factor until the other one is known.

    A factor that its side's map does not shrink is returned as it is: a one-hot factor under the identity,
    both factors of an entrywise product, whose maps list K entries, usually more than the side has, and a side
    shorter than the K of a circular product.
    """
    if compressor.product == "entrywise" or (compressor.product == "circular" and is_mapped_late(compressor, side)):
        return factor
    one = compressor.left if side == "left" else compressor.right
    if isinstance(factor, OneHot):
        return factor if isinstance(one, Identity) else one.columns(factor.ids)
    return one.apply(factor)


def combine(compressor: Compressor, left: LeftFactor, right: RightFactor) -> Float[Tensor, "example size"]:
    """Return the compressed gradient from factors that `reduce_factor` returned, summed over tokens in float32.

    Padded positions have to be zero in one of the two factors. Half precision is widened before the product,
    so the sum over tokens does not lose the small terms; float64 stays float64.
    """
    assert not isinstance(right, OneHot), "only a left factor can be one-hot"
    right = right.to(torch.promote_types(right.dtype, torch.float32))
    if compressor.product == "circular":
        return compressor.tail.apply(circular(compressor, left, right))
    shape = compressor.left.in_size, compressor.right.in_size
    gathered = compressor.product == "entrywise" and is_gathered(compressor.left.out_size, shape)
    if gathered and not isinstance(left, OneHot):
        return compressor.tail.apply(entrywise(compressor, left.to(right.dtype), right))
    tail = compressor.tail if compressor.product == "outer" else outer_form(compressor).tail
    if isinstance(left, OneHot):
        return _combine_one_hot(tail, left, right)
    left = left.to(right.dtype)
    if isinstance(tail, Identity):
        return _product(left, right)
    count = left.shape[2] * right.shape[2]
    parts = [tail.apply(_product(left[part], right[part])) for part in _chunks(len(left), count)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _chunks(examples: int, numbers: int) -> Iterator[slice]:
    """Yield slices of the examples such that `numbers` float32 numbers for each fit in PRODUCT_BYTES."""
    step = max(1, PRODUCT_BYTES // (4 * numbers))
    return (slice(start, min(examples, start + step)) for start in range(0, max(examples, 1), step))


def _product(
    left: Float[Tensor, "example token left"], right: Float[Tensor, "example token right"]
) -> Float[Tensor, "example product"]:
    """Return `sum_t left[t] (x) right[t]`, flattened with the left index major."""
    if left.shape[1] == 1:
        return (left.transpose(1, 2) * right).flatten(1)
    # bmm took 18 us where einsum took 28 (16 examples, 128 tokens, 16x16).
    return torch.bmm(left.transpose(1, 2), right).flatten(1)


def _combine_one_hot(
    tail: LinearMap, left: OneHot, right: Float[Tensor, "example token right"]
) -> Float[Tensor, "example size"]:
    """Add `right[t]` to row `ids[t]` of the gradient; all other rows are never formed."""
    columns = right.shape[2]
    ids = left.ids.unsqueeze(-1) * columns + torch.arange(columns, device=right.device)
    return _apply_sparse(tail, ids.flatten(1), right.flatten(1))


def _apply_sparse(
    tail: LinearMap, ids: Int[Tensor, "example entry"], values: Float[Tensor, "example entry"]
) -> Float[Tensor, "example size"]:
    if isinstance(tail, Composed):
        images = _apply_sparse(tail.maps[0], ids, values)
        for one in tail.maps[1:]:
            images = one.apply(images)
        return images
    sparse = getattr(tail, "apply_sparse", None)
    if sparse is not None:
        return sparse(ids, values)
    dense = Identity(tail.in_size)
    parts = [tail.apply(dense.apply_sparse(ids[part], values[part])) for part in _chunks(len(ids), tail.in_size)]
    return torch.cat(parts)


def outer_form(compressor: Compressor) -> Compressor:
    """Return the same map with an outer product: slower, and what the other two products are defined by."""
    if compressor.product == "outer":
        return compressor
    left, right, tail = compressor.left, compressor.right, compressor.tail
    if compressor.product == "circular":
        return Compressor(left, right, Composed([Wrap(left.out_size), tail]))
    assert isinstance(left, Coordinates)
    assert isinstance(right, Coordinates)
    index = left.index * right.in_size + right.index
    mask = Coordinates(left.in_size * right.in_size, index, left.scale * right.scale)
    return Compressor(Identity(left.in_size), Identity(right.in_size), Composed([mask, tail]))


def is_gathered(kept: int, shape: tuple[int, int]) -> bool:
    """Return whether gathering the kept entries of a gradient costs less than forming it."""
    return kept * _GATHER_COST < shape[0] * shape[1]


def compress_gradient(
    compressor: Compressor, gradient: Float[Tensor, "example out in"]
) -> Float[Tensor, "example size"]:
    """Compress gradients that exist as matrices; the reference for `compress_factors`."""
    form = outer_form(compressor)
    reduced = form.left.apply(form.right.apply(gradient).transpose(1, 2)).transpose(1, 2)
    return form.tail.apply(reduced.flatten(1))


def adjoint_gradient(
    compressor: Compressor, compressed: Float[Tensor, "example size"]
) -> Float[Tensor, "example out in"]:
    """Map compressed gradients back to matrices by the transposed map.

    For any G and y, `compress_gradient(G) . y` equals `G . adjoint_gradient(y)`.

    For unbiased compressors, the adjoint of a compressed gradient is an unbiased estimate of the gradient.
    """
    form = outer_form(compressor)
    inner = form.tail.adjoint(compressed).unflatten(1, (form.left.out_size, form.right.out_size))
    return form.right.adjoint(form.left.adjoint(inner.transpose(1, 2)).transpose(1, 2))
