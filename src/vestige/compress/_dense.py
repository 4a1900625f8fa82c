"""Dense random projections: Gaussian, Rademacher or orthonormal rows, scaled so that inner products are unbiased."""

import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import lru_cache
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from vestige.compress._registry import LinearMap, Stream, compressor, gaussians, signs
from vestige.errors import SpecError


@lru_cache(maxsize=4096)
def allocate(shape: tuple[int, int], total: int, minimum: int) -> tuple[int, int]:
    """Return `(k_out, k_in)` for a gradient `[n_out, n_in]`: the product as close to `total` as integers allow.

    Over all `min(minimum, n) <= k <= n` on each side, minimises `|k_out * k_in - total|`. Among pairs that are
    equally close, the one with `k_in / k_out` closest (as a ratio) to `n_out / n_in` wins, at which the two
    projections `k_out * n_out` and `k_in * n_in` cost the same; then the smaller product, then the smaller `k_in`.

    The published rule starts from `k_in = sqrt(total * n_out / n_in)` and tries two steps around it, which
    misses pairs: 6x5 for a rank of 64 on sides of 20 and 5, where 16x4 and 13x5 fit.

    The minimum wins over the total: with two minimal sides of 8, a total of 20 gives 8x8.
    """
    rows, columns = shape
    inputs = np.arange(min(minimum, columns), columns + 1, dtype=np.int64)
    # For one k_in, the best k_out is one of the two integers around total / k_in, or the nearest allowed one.
    outputs = np.stack([total // inputs, -(-total // inputs)]).clip(min(minimum, rows), rows)
    misses = np.abs(outputs * inputs - total)
    best = [(int(outputs[one, at]), int(inputs[at])) for one, at in np.argwhere(misses == misses.min())]

    def preference(pair: tuple[int, int]) -> tuple[Fraction, int, int]:
        output, input_ = pair
        imbalance = Fraction(input_ * columns, output * rows)
        return max(imbalance, 1 / imbalance), output * input_, input_

    return min(best, key=preference)


Init = Literal["gaussian", "rademacher"]
STORED_BYTES = 32 * 2**20  # a larger matrix on the whole gradient is generated again, block by block, at each use
DEFAULT_MINIMUM = 8  # of each side, when a total rank is divided

_draws: dict[Init, Callable[[Stream, Tensor], Tensor]] = {"gaussian": gaussians, "rademacher": signs}


class Dense(LinearMap):
    """Multiplies by a stored matrix `[out, in]`."""

    def __init__(self, matrix: Float[Tensor, "out in"]) -> None:
        self.out_size, self.in_size = matrix.shape
        self._matrices = {matrix.dtype: matrix}
        self.matrix = matrix

    def _in(self, dtype: torch.dtype) -> Tensor:
        if dtype not in self._matrices:
            self._matrices[dtype] = self.matrix.to(dtype)
        return self._matrices[dtype]

    def apply(self, vectors: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Compute one matrix product."""
        return F.linear(vectors, self._in(vectors.dtype))

    def columns(self, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch out"]:
        """Return columns of the matrix."""
        return F.embedding(ids, self.matrix.t())

    def adjoint(self, images: Float[Tensor, "*batch out"]) -> Float[Tensor, "*batch in"]:
        """Compute one product with the transposed matrix."""
        return images @ self._in(images.dtype)

    def to(self, device: torch.device) -> "Dense":
        """Return the same matrix on `device`."""
        return Dense(self.matrix.to(device))


class StreamedDense(LinearMap):
    """Multiplies by a matrix that is generated in blocks of columns and never held as a whole.

    Exactly the matrix that `Dense` would hold, at the cost of hashing all of it at each use; made for the
    rare dense projection of a large flattened gradient, where the matrix would not fit in memory.
    """

    block_entries: ClassVar[int] = 1 << 21
    """Most entries of the matrix that are generated at once."""

    def __init__(self, in_size: int, out_size: int, stream: Stream, init: Init, device: torch.device) -> None:
        self.in_size = in_size
        self.out_size = out_size
        self.stream = stream
        self.init: Init = init
        self.device = device

    def _blocks(self) -> list[tuple[int, int]]:
        step = max(1, self.block_entries // self.out_size)
        return [(start, min(self.in_size, start + step)) for start in range(0, self.in_size, step)]

    def _block(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        ids = torch.arange(start, stop, device=self.device)
        return random_columns(self.stream, self.init, ids, self.out_size).to(dtype)

    def apply(self, vectors: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Return the sum over blocks of coordinates, accumulated in float32 (float64 for float64 vectors)."""
        flat = vectors.reshape(-1, self.in_size)
        wide = torch.promote_types(vectors.dtype, torch.float32)
        total = flat.new_zeros(len(flat), self.out_size, dtype=wide)
        for start, stop in self._blocks():
            total += flat[:, start:stop].to(wide) @ self._block(start, stop, wide)
        return total.to(vectors.dtype).view(*vectors.shape[:-1], self.out_size)

    def columns(self, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch out"]:
        """Generate columns of the matrix."""
        return random_columns(self.stream, self.init, ids, self.out_size)

    def adjoint(self, images: Float[Tensor, "*batch out"]) -> Float[Tensor, "*batch in"]:
        """Compute the result block by block."""
        flat = images.reshape(-1, self.out_size)
        wide = torch.promote_types(images.dtype, torch.float32)
        parts = [flat.to(wide) @ self._block(start, stop, wide).t() for start, stop in self._blocks()]
        return torch.cat(parts, dim=1).to(images.dtype).view(*images.shape[:-1], self.in_size)

    def to(self, device: torch.device) -> "StreamedDense":
        """Return the same matrix, generated on `device`."""
        return StreamedDense(self.in_size, self.out_size, self.stream, self.init, device)


def random_columns(
    stream: Stream, init: Init, ids: Int[Tensor, "*batch"], out_size: int
) -> Float[Tensor, "*batch out"]:
    """Generate columns `ids` of the matrix: entry (row, column) is the draw at coordinate `column * out_size + row`."""
    rows = torch.arange(out_size, device=ids.device)
    return _draws[init](stream, ids.unsqueeze(-1) * out_size + rows) / math.sqrt(out_size)


def draw_dense(in_size: int, out_size: int, stream: Stream, init: Init) -> Dense:
    """Return the random matrix, held in memory."""
    return Dense(random_columns(stream, init, torch.arange(in_size), out_size).t().contiguous())


def _whole(in_size: int, out_size: int, stream: Stream, init: Init) -> LinearMap:
    if in_size * out_size * 4 <= STORED_BYTES:
        return draw_dense(in_size, out_size, stream, init)
    return StreamedDense(in_size, out_size, stream, init, torch.device("cpu"))


@compressor("gauss", forms=("K",), example="gauss:1024", shareable=True)
def gauss(in_size: int, out_size: int, stream: Stream) -> LinearMap:
    """Draw independent normal entries of variance `1 / k` for the whole gradient."""
    return _whole(in_size, out_size, stream, "gaussian")


@compressor("rademacher", forms=("K",), example="rademacher:1024", shareable=True)
def rademacher(in_size: int, out_size: int, stream: Stream) -> LinearMap:
    """Draw entries `±1 / sqrt(k)` for the whole gradient."""
    return _whole(in_size, out_size, stream, "rademacher")


def orthonormal(in_size: int, out_size: int, stream: Stream) -> Dense:
    """Return orthogonal rows of length `sqrt(in / out)`: a uniformly random subspace.

    The rows are the reduced QR factor, in float64, of the matrix of `init=gaussian`, with the signs that make the
    triangular factor's diagonal positive. `E[P^T P]` of orthonormal rows is `out / in` times the identity, so rows of
    length one, as published, shrink every inner product by that factor on average.
    """
    columns = random_columns(stream, "gaussian", torch.arange(in_size), out_size)
    basis, triangle = torch.linalg.qr(columns.to(torch.float64))
    basis *= triangle.diagonal().sign() * math.sqrt(in_size / out_size)
    return Dense(basis.t().to(torch.float32).contiguous())


def _minimum_is_for_totals(size: tuple[int, ...], options: Mapping[str, Any]) -> None:
    if len(size) == 2 and options["min"] != DEFAULT_MINIMUM:
        raise SpecError(
            f"'logra:{size[0]}x{size[1]},min={options['min']}': min limits how a total rank is divided, and both "
            f"sides are given here. Write logra:{size[0]}x{size[1]}, or 'logra:{size[0] * size[1]},"
            f"min={options['min']}'."
        )


def _divide(shape: tuple[int, int], total: int, options: Mapping[str, Any]) -> tuple[int, int]:
    return allocate(shape, total, options["min"])


@compressor("logra", forms=("K", "AxB"), example="logra:64x64", check=_minimum_is_for_totals, allocate=_divide)
def logra(
    in_size: int,
    out_size: int,
    stream: Stream,
    *,
    init: Literal["gaussian", "rademacher", "orthonormal"] = "gaussian",
    min: int = DEFAULT_MINIMUM,  # noqa: ARG001  (used before, to divide a total rank)
) -> LinearMap:
    """Return a dense projection of each side of the gradient (LoGra, Choe et al. 2024)."""
    if init == "orthonormal":
        return orthonormal(in_size, out_size, stream)
    return draw_dense(in_size, out_size, stream, init)
