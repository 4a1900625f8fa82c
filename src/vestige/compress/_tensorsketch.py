"""TensorSketch: a count sketch of the whole gradient, computed from sketches of its two factors.

Entry (i, j) of the gradient goes, with sign `s(i) t(j)`, to position `h(i) + g(j) mod K`. For an outer product this is
the circular convolution of the two sides' sketches (Pham & Pagh 2013), so a token costs two Fourier transforms of K
numbers instead of `out * in` additions, and the sum over tokens is taken between the transforms.

Two choices make it more precise than the published form with independent hashes. Positions are balanced: coordinates
K apart share one, closer ones never do, so no row or column of the gradient collides with itself before it is
longer than K. And one side keeps its order while the other is permuted, which is enough for any two entries
in different rows and columns to meet with probability `1 / (K - 1)`. Unbiasedness needs only the random signs.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from vestige.compress._registry import LinearMap, Stream, compressor, permutation, signs


class Fold(LinearMap):
    """Adds coordinate j, times a random sign, to position `order[j mod K]` of K."""

    def __init__(self, in_size: int, sign: Float[Tensor, " in"], order: Int[Tensor, " out"]) -> None:
        self.in_size = in_size
        self.out_size = len(order)
        self.sign = sign
        self.order = order
        self._source = torch.argsort(order)
        self._ordered = bool((order[1:] > order[:-1]).all())
        self._signs: dict[torch.dtype, Tensor] = {}

    def apply(self, vectors: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Return the signed sums, in float32 for halves until they are complete."""
        flat = vectors.reshape(-1, self.in_size)
        sums = self._in_blocks(flat) if flat.device.type == "cpu" else self._at_once(flat)
        if not self._ordered:
            sums = sums.index_select(1, self._source)
        return sums.to(vectors.dtype).view(*vectors.shape[:-1], self.out_size)

    def _in_blocks(self, flat: Float[Tensor, "vector in"]) -> Float[Tensor, "vector _out"]:
        """Add up K coordinates at a time: on a CPU the sums stay in its cache."""
        size, wide = self.out_size, torch.promote_types(flat.dtype, torch.float32)
        flat, sign = flat.to(wide), self.sign.to(wide)
        sums = flat[:, :size] * sign[:size]
        for start in range(size, self.in_size, size):
            part = slice(start, min(start + size, self.in_size))
            sums[:, : part.stop - start].addcmul_(flat[:, part], sign[part])
        return F.pad(sums, (0, size - self.in_size)) if self.in_size < size else sums

    def _at_once(self, flat: Float[Tensor, "vector in"]) -> Float[Tensor, "vector _out"]:
        """Add up all runs of K coordinates in one reduction; torch adds halves up in float32.

        A sign times a half is a half, so nothing is rounded before.
        """
        if flat.dtype not in self._signs:
            self._signs[flat.dtype] = self.sign.to(flat.dtype)
        sign, missing = self._signs[flat.dtype], -self.in_size % self.out_size
        if missing:
            signed = flat.new_zeros(len(flat), self.in_size + missing)
            torch.mul(flat, sign, out=signed[:, : self.in_size])
        else:
            signed = flat * sign
        return signed.view(len(flat), -1, self.out_size).sum(1)

    def columns(self, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch out"]:
        """Return a row with the sign at the coordinate's position."""
        rows = torch.zeros(*ids.shape, self.out_size, device=ids.device)
        place = self.order[ids % self.out_size]
        return rows.scatter_(-1, place.unsqueeze(-1), self.sign[ids].unsqueeze(-1))

    def adjoint(self, images: Float[Tensor, "*batch out"]) -> Float[Tensor, "*batch in"]:
        """Read back, for every coordinate, the sum that it was added to."""
        place = self.order[torch.arange(self.in_size, device=self.order.device) % self.out_size]
        return images[..., place] * self.sign.to(images.dtype)

    def to(self, device: torch.device) -> "Fold":
        """Return the same map with its signs on `device`."""
        return Fold(self.in_size, self.sign.to(device), self.order.to(device))


class Wrap(LinearMap):
    """Sums the entries (a, b) of a K by K matrix with equal `a + b mod K`: convolution as a map of the product."""

    def __init__(self, size: int) -> None:
        self.in_size = size * size
        self.out_size = size

    def _place(self, device: torch.device) -> Int[Tensor, "size size"]:
        position = torch.arange(self.out_size, device=device)
        return (position.unsqueeze(1) + position) % self.out_size

    def apply(self, vectors: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Return the sums over wrapped antidiagonals."""
        if vectors.device.type == "cpu":
            sums = vectors.new_zeros(*vectors.shape[:-1], self.out_size)
            return sums.index_add_(-1, self._place(vectors.device).flatten(), vectors)
        # Row a of the matrix, written twice, read from a places earlier on: then a column is a wrapped antidiagonal.
        size = self.out_size
        twice = vectors.reshape(-1, size, 1, size).expand(-1, -1, 2, -1).contiguous()
        skewed = twice.as_strided((len(twice), size, size), (2 * size * size, 2 * size - 1, 1), size)
        return skewed.sum(1).view(*vectors.shape[:-1], size)

    def columns(self, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch out"]:
        """Return one-hot rows."""
        place = (ids // self.out_size + ids % self.out_size) % self.out_size
        return F.one_hot(place, self.out_size).to(torch.float32)

    def adjoint(self, images: Float[Tensor, "*batch out"]) -> Float[Tensor, "*batch in"]:
        """Read, for every entry, the sum of its antidiagonal."""
        return images[..., self._place(images.device).flatten()]


@compressor("tensorsketch", forms=("K",), example="tensorsketch:256", product="circular")
def tensorsketch(in_sizes: tuple[int, int], out_size: int, stream: Stream) -> tuple[Fold, Fold]:
    """Draw the sketches of the output side, in order, and of the input side, permuted."""
    left, right = (stream.child(side) for side in ("left", "right"))
    return (
        Fold(in_sizes[0], signs(left, torch.arange(in_sizes[0])), torch.arange(out_size)),
        Fold(in_sizes[1], signs(right, torch.arange(in_sizes[1])), permutation(right.child("order"), out_size)),
    )
