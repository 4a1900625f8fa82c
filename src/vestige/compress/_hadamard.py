"""The subsampled randomized Hadamard transform: a dense orthogonal rotation in n log n additions.

`x -> (H D x)[rows] / sqrt(k)`: random signs D, the Walsh-Hadamard matrix H of the next power of two, k rows drawn
without replacement (Ailon & Chazelle 2006; Tropp 2011). Published software calls a dense Rademacher product `fjlt`.
"""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from vestige.compress._registry import LinearMap, Stream, Work, compressor, permutation_head, signs


class Hadamard(LinearMap):
    """Keeps the coordinates `row` of the Walsh-Hadamard transform of `sign * x`, divided by `sqrt(k)`.

    The transform adds and subtracts in an order that depends on nothing but its size, so an example's image is the
    same to the last bit in any batch.
    """

    cached_numbers: ClassVar[int] = 1 << 18
    """Numbers that are transformed at once: a few float32 buffers of them stay in a core's cache."""

    def __init__(self, sign: Float[Tensor, " in"], row: Int[Tensor, " out"]) -> None:
        self.in_size = len(sign)
        self.out_size = len(row)
        self.padded = 1 << max(0, self.in_size - 1).bit_length()
        self.sign = sign
        self.row = row

    def apply(self, vectors: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Return the kept coordinates, in float32 for halves until the last addition."""
        wide = torch.promote_types(vectors.dtype, torch.float32)
        flat, sign = vectors.reshape(-1, self.in_size), self.sign.to(wide)
        step = max(1, self.cached_numbers // self.padded)
        images = flat.new_empty(len(flat), self.out_size, dtype=wide)
        for start in range(0, len(flat), step):
            signed = F.pad(flat[start : start + step].to(wide) * sign, (0, self.padded - self.in_size))
            images[start : start + step] = walsh_hadamard(signed).index_select(1, self.row)
        images /= math.sqrt(self.out_size)
        return images.to(vectors.dtype).view(*vectors.shape[:-1], self.out_size)

    def columns(self, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch out"]:
        """Return columns: entry (r, j) is -1 to the number of ones that r and j have in common in binary."""
        common = ids.unsqueeze(-1) & self.row
        for shift in (32, 16, 8, 4, 2, 1):
            common = common ^ (common >> shift)
        parity = (1 - 2 * (common & 1)).to(torch.float32)
        return parity * self.sign[ids].unsqueeze(-1) / math.sqrt(self.out_size)

    def adjoint(self, images: Float[Tensor, "*batch out"]) -> Float[Tensor, "*batch in"]:
        """Return the images at their rows, transformed (the matrix is symmetric), times the signs."""
        wide = torch.promote_types(images.dtype, torch.float32)
        flat = images.reshape(-1, self.out_size).to(wide) / math.sqrt(self.out_size)
        step = max(1, self.cached_numbers // self.padded)
        vectors = flat.new_empty(len(flat), self.in_size)
        for start in range(0, len(flat), step):
            part = flat[start : start + step]
            spread = part.new_zeros(len(part), self.padded).index_copy_(1, self.row, part)
            vectors[start : start + step] = walsh_hadamard(spread)[:, : self.in_size]
        vectors *= self.sign.to(wide)
        return vectors.to(images.dtype).view(*images.shape[:-1], self.in_size)


def walsh_hadamard(vectors: Float[Tensor, "batch size"]) -> Float[Tensor, "batch size"]:
    """Return the unnormalised Walsh-Hadamard transform in Sylvester order; `size` is a power of two.

    `H_n` is the Kronecker product of `H_a` and `H_b` with `a * b = n`. Both are done along the outer axis of an
    a by b matrix and its transpose, so that every addition runs over long contiguous rows.
    """
    batch, size = vectors.shape
    outer = 1 << (size.bit_length() // 2)
    matrix = _along_rows(vectors.reshape(batch, outer, size // outer))
    return _along_rows(matrix.transpose(1, 2).contiguous()).transpose(1, 2).reshape(batch, size)


def _along_rows(matrix: Float[Tensor, "batch rows columns"]) -> Float[Tensor, "batch rows columns"]:
    """Transform every column."""
    batch, rows, columns = matrix.shape
    half = rows // 2
    while half:
        pairs = matrix.view(batch, rows // (2 * half), 2, half * columns)
        first, second = pairs[:, :, 0], pairs[:, :, 1]
        matrix = torch.stack([first + second, first - second], dim=2)
        half //= 2
    return matrix.view(batch, rows, columns)


def _count_work(size: int, _: int) -> Work:
    padded = 1 << (size - 1).bit_length()
    return Work(streamed=2 * padded * math.log2(padded))


@compressor("fjlt", forms=("K", "AxB"), example="fjlt:1024", work=_count_work)
def fjlt(in_size: int, out_size: int, stream: Stream) -> Hadamard:
    """Draw signs and rows of the Hadamard matrix, for the whole gradient or for each side."""
    sign = signs(stream.child("sign"), torch.arange(in_size))
    padded = 1 << max(0, in_size - 1).bit_length()
    return Hadamard(sign, permutation_head(stream.child("row"), out_size, padded))
