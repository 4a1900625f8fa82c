"""Entrywise and circular products of two factors, computed piece by piece so that every buffer stays in a core's cache.

Both hold several times as many numbers per token as they return per example. In one piece those buffers would be
written to main memory, from pages that the system first has to fill with zeros: transforming 8 examples of 128 tokens
to 4096 numbers took 40 us a token at once and 17 in pieces, at 256 numbers 2.4 and 0.6.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from vestige.compress._coordinates import Coordinates
from vestige.compress._types import Compressor, LinearMap
from vestige.gradients import Factor, OneHot, Side

PIECE_NUMBERS = 2**17
"""Numbers of one buffer on a CPU: half a megabyte in float32."""
DEVICE_PIECE_NUMBERS = 2**25
"""The same on other devices, where every piece costs the start of a few kernels: only memory is limited."""


def piece_numbers(device: torch.device) -> int:
    """Return how many numbers a buffer on a device holds."""
    return PIECE_NUMBERS if device.type == "cpu" else DEVICE_PIECE_NUMBERS


def is_mapped_late(compressor: Compressor, side: Side) -> bool:
    """Return whether a factor of a circular product is kept as it is and mapped when both are known.

    So it is where the map would make it longer: a factor may have to wait from the forward to the backward pass.
    """
    one = compressor.left if side == "left" else compressor.right
    return one.in_size <= one.out_size


def circular(
    compressor: Compressor, left: Factor, right: Float[Tensor, "example token _right"]
) -> Float[Tensor, "example size"]:
    """Return `sum_t` of the circular convolutions of the mapped factors, from what `reduce_factor` left of them."""
    size, dtype = compressor.left.out_size, right.dtype
    rows = []
    for examples, pieces in _pieces(right.shape[0], right.shape[1], piece_numbers(right.device) // size):
        total = None
        for tokens in pieces:
            # The product is taken in place: a third buffer would cost half as much as a transform.
            spectrum = torch.fft.rfft(_mapped(compressor.left, "left", compressor, left, examples, tokens).to(dtype))
            spectrum *= torch.fft.rfft(_mapped(compressor.right, "right", compressor, right, examples, tokens))
            total = spectrum.sum(1) if total is None else total.add_(spectrum.sum(1))
        if total is not None:
            rows.append(total)
    if not rows:
        return right.new_zeros(right.shape[0], size)
    return torch.fft.irfft(torch.cat(rows), n=size)


def _mapped(
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
    for examples, pieces in _pieces(left.shape[0], left.shape[1], piece_numbers(left.device) // first.out_size):
        for tokens in pieces:
            kept[examples] += (first.apply(left[examples, tokens]) * second.apply(right[examples, tokens])).sum(1)
    return kept


def _by_entry(
    first: Coordinates, second: Coordinates, left: Float[Tensor, "example token _out"], right: Tensor
) -> Float[Tensor, "example kept"]:
    examples, tokens = left.shape[:2]
    sides = [side.reshape(examples * tokens, -1).t().contiguous() for side in (left, right)]
    step = max(1, piece_numbers(left.device) // max(1, examples * tokens))
    kept = left.new_empty(first.out_size, examples)
    for start in range(0, first.out_size, step):
        part = slice(start, start + step)
        product = sides[0].index_select(0, first.index[part])
        product *= sides[1].index_select(0, second.index[part])
        kept[part] = product.view(-1, examples, tokens).sum(2)
    return kept.t() * (first.scale * second.scale)
