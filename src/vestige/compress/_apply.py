"""Compressed gradients from factors, without the gradient where that is cheaper."""

from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vestige.compress._mask import Coordinates
from vestige.compress._registry import Composed, Compressor, Identity, LinearMap
from vestige.compress._tensorsketch import Wrap
from vestige.gradients import Factor, OneHot, Side, multiply_wide
from vestige.timing import time_phase


class BlockSizes:
    """How much is formed at once: other sizes change no number beyond rounding."""

    product_bytes: ClassVar[int] = 256 * 2**20
    """Most bytes of products of two factors."""
    cpu_numbers: ClassVar[int] = 2**17
    """Numbers of one buffer on a CPU: half a megabyte in float32."""
    device_numbers: ClassVar[int] = 2**25
    """The same on other devices, where every piece costs the start of a few kernels: only memory is limited."""
    multiplied: ClassVar[int] = 512
    """Most numbers of a circular product that is taken as a matrix product there. K^2 multiply-adds a token and some
    20 K^2 bytes an example then replace some 90 K bytes a token for the transforms: not measured."""

    @classmethod
    def numbers(cls, device: torch.device) -> int:
        """Return how many numbers a buffer on a device holds."""
        return cls.cpu_numbers if device.type == "cpu" else cls.device_numbers


def is_mapped_late(compressor: Compressor, side: Side) -> bool:
    """Return whether a factor of a circular product is kept as it is and mapped when both are known.

    So it is where the map would make it longer: a factor may have to wait from the forward to the backward pass.
    """
    one = compressor.left if side == "left" else compressor.right
    return one.in_size <= one.out_size


def is_multiplied(compressor: Compressor, right: Float[Tensor, "example token _right"]) -> bool:
    """Return whether a circular product is cheaper as the matrix product of both sides that `outer_form` has."""
    size = compressor.left.out_size
    return right.device.type != "cpu" and size <= BlockSizes.multiplied and size <= 4 * right.shape[1]


def circular(
    compressor: Compressor, left: Factor, right: Float[Tensor, "example token _right"]
) -> Float[Tensor, "example size"]:
    """Return `sum_t` of the circular convolutions of the mapped factors, from what `reduce_factor` left of them."""
    size, dtype = compressor.left.out_size, right.dtype
    rows = []
    for examples, pieces in _pieces(right.shape[0], right.shape[1], BlockSizes.numbers(right.device) // size):
        total = None
        for tokens in pieces:
            # The product is taken in place: a third buffer would cost half as much as a transform.
            spectrum = torch.fft.rfft(_map_side(compressor.left, "left", compressor, left, examples, tokens).to(dtype))
            spectrum *= torch.fft.rfft(_map_side(compressor.right, "right", compressor, right, examples, tokens))
            total = spectrum.sum(1) if total is None else total.add_(spectrum.sum(1))
        if total is not None:
            rows.append(total)
    if not rows:
        return right.new_zeros(right.shape[0], size)
    return torch.fft.irfft(torch.cat(rows) if len(rows) > 1 else rows[0], n=size)


def _map_side(
    one: LinearMap, side: Side, compressor: Compressor, factor: Factor, examples: slice, tokens: slice
) -> Float[Tensor, "piece token_piece size"]:
    if isinstance(factor, OneHot):
        return one.columns(factor.ids[examples, tokens])
    part = factor[examples, tokens]
    return one.apply(part) if is_mapped_late(compressor, side) else part


def _pieces(examples: int, tokens: int, most: int) -> Iterator[tuple[slice, list[slice]]]:
    """Yield slices of the examples, each with slices of the tokens, of at most `most` (but at least one) together."""
    most = max(1, most)
    steps = [slice(start, min(tokens, start + most)) for start in range(0, tokens, most)]
    at_once = max(1, most // max(1, tokens))
    for start in range(0, examples, at_once):
        yield slice(start, min(examples, start + at_once)), steps


def entrywise(
    compressor: Compressor, left: Float[Tensor, "example token out"], right: Float[Tensor, "example token in"]
) -> Float[Tensor, "example kept"]:
    """Return `sum_t left[t, row_j] * right[t, column_j]` for every kept entry j.

    Few entries are gathered one by one from every token. For more it pays to transpose the factors first, which costs
    a write for each of their numbers: then an entry's numbers for all tokens lie side by side.
    """
    first, second = compressor.left, compressor.right
    assert isinstance(first, Coordinates)
    assert isinstance(second, Coordinates)
    if first.out_size > first.in_size + second.in_size:
        return _by_entry(first, second, left, right)
    return _by_token(first, second, left, right)


def _by_token(
    first: Coordinates, second: Coordinates, left: Float[Tensor, "example token _out"], right: Tensor
) -> Float[Tensor, "example kept"]:
    kept = left.new_zeros(left.shape[0], first.out_size)
    for examples, pieces in _pieces(left.shape[0], left.shape[1], BlockSizes.numbers(left.device) // first.out_size):
        for tokens in pieces:
            kept[examples] += (first.apply(left[examples, tokens]) * second.apply(right[examples, tokens])).sum(1)
    return kept


def _by_entry(
    first: Coordinates, second: Coordinates, left: Float[Tensor, "example token _out"], right: Tensor
) -> Float[Tensor, "example kept"]:
    examples, tokens = left.shape[:2]
    sides = [side.reshape(examples * tokens, -1).t().contiguous() for side in (left, right)]
    step = max(1, BlockSizes.numbers(left.device) // max(1, examples * tokens))
    kept = left.new_empty(first.out_size, examples)
    for start in range(0, first.out_size, step):
        part = slice(start, start + step)
        product = sides[0].index_select(0, first.index[part])
        product *= sides[1].index_select(0, second.index[part])
        kept[part] = product.view(-1, examples, tokens).sum(2)
    return kept.t() * (first.scale * second.scale)


# The two factors of one gradient have sides of different lengths, which one axis name cannot express.
LeftFactor = Float[Tensor, "example token left"] | OneHot
RightFactor = Float[Tensor, "example token right"] | OneHot
ReducedFactor = Float[Tensor, "example token kept"] | OneHot

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
    wide = torch.promote_types(right.dtype, torch.float32)
    if compressor.product == "circular":
        if not is_multiplied(compressor, right):
            return compressor.tail.apply(circular(compressor, left, right.to(wide)))
        everything = slice(None), slice(None)
        left = _map_side(compressor.left, "left", compressor, left, *everything)
        right = _map_side(compressor.right, "right", compressor, right, *everything)
    shape = compressor.left.in_size, compressor.right.in_size
    gathered = compressor.product == "entrywise" and is_gathered(compressor.left.out_size, shape)
    if gathered and not isinstance(left, OneHot):
        return compressor.tail.apply(entrywise(compressor, left.to(wide), right.to(wide)))
    tail = compressor.tail if compressor.product == "outer" else outer_form(compressor).tail
    if isinstance(left, OneHot):
        return _combine_one_hot(tail, left, right.to(wide))
    if isinstance(tail, Identity):
        return _product(left, right)
    count = left.shape[2] * right.shape[2]
    parts = [tail.apply(_product(left[part], right[part])) for part in _chunks(len(left), count)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _chunks(examples: int, numbers: int) -> Iterator[slice]:
    """Yield slices of the examples such that `numbers` float32 numbers for each fit in `BlockSizes.product_bytes`."""
    step = max(1, BlockSizes.product_bytes // (4 * numbers))
    return (slice(start, min(examples, start + step)) for start in range(0, max(examples, 1), step))


def _product(
    left: Float[Tensor, "example token left"], right: Float[Tensor, "example token right"]
) -> Float[Tensor, "example product"]:
    """Return `sum_t left[t] (x) right[t]`, at least float32, flattened with the left index major."""
    if left.shape[1] == 1:
        wide = torch.promote_types(right.dtype, torch.float32)
        return (left.to(wide).transpose(1, 2) * right.to(wide)).flatten(1)
    # bmm took 18 us where einsum took 28 (16 examples, 128 tokens, 16x16).
    return multiply_wide(left.transpose(1, 2), right).flatten(1)


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


class CompressingSink:
    """A `FactorSink` that compresses every factor when it comes and adds up products in place.

    Component number c fills columns `starts[c]` to `starts[c] + compressors[c].size`. Components may share
    columns: the compressed gradients are then summed, which is one sketch of the whole gradient, because
    compressors of different components are independent.

    Attributes:
        gradients: float32 `[example, width]`, of the batch announced by the last `begin`.
    """

    gradients: Float[Tensor, "example width"]

    def __init__(self, compressors: Sequence[Compressor], starts: Sequence[int], width: int) -> None:
        self.compressors = list(compressors)
        self.columns = [slice(start, start + one.size) for one, start in zip(self.compressors, starts, strict=True)]
        assert all(columns.stop <= width for columns in self.columns), "a component reaches past the last column"
        self.width = width

    def begin(self, examples: int, device: torch.device | str) -> None:
        """Start a batch: zeros for its examples."""
        self.gradients = torch.zeros(examples, self.width, device=device)

    def reduce(self, component: int, side: Side, factor: Factor) -> ReducedFactor:
        """Return the factor under its side's map: what the other factor will be combined with."""
        with time_phase("compression"):
            return reduce_factor(self.compressors[component], side, factor)

    def accumulate(self, component: int, examples: slice, left: LeftFactor, right: RightFactor) -> None:
        """Add the compressed gradients of `examples` from both reduced factors."""
        with time_phase("compression"):
            compressed = combine(self.compressors[component], left, right)
            # Of a model on several devices, each component is compressed on its own.
            self.gradients[examples, self.columns[component]] += compressed.to(self.gradients.device)
