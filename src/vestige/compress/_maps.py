"""Describe this module."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


@runtime_checkable
class LinearMap(Protocol):
    """A fixed linear map from `in_size` to `out_size` numbers, acting on the last axis.

    The same (seed, name) gives the same map on every device, worker and batch order.
    """

    in_size: int
    out_size: int

    def apply(self, vectors: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Return the image of each vector, in the vector's dtype (float32 accumulation for halves)."""
        ...

    def columns(self, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch out"]:
        """Return the image of the unit vectors `ids`: `apply(one_hot(ids))` without forming the one-hot."""
        ...

    def adjoint(self, images: Float[Tensor, "*batch out"]) -> Float[Tensor, "*batch in"]:
        """Return the image under the transposed map: `apply(x) @ y` equals `x @ (this of y)` for all x and y."""
        ...

    def to(self, device: torch.device) -> "LinearMap":
        """Return the same map, with what it stores on `device`."""
        ...


Product = Literal["outer", "entrywise", "circular"]


@dataclass(frozen=True)
class Compressor:
    """Maps the gradient `[out, in]` of one component to `size` numbers, from its factors.

    The compressed gradient is `tail(sum_t left(l_t) * right(r_t))`, where `*` is

    - `outer`: the outer product, flattened with the left index major;
    - `entrywise`: the product of entries, for sides that list the rows and columns of the same K coordinates: a
      mask over the whole matrix, gathered without forming the matrix;
    - `circular`: the circular convolution of two vectors of K numbers (TensorSketch).
    """

    left: LinearMap
    right: LinearMap
    tail: LinearMap
    product: Product = "outer"

    @property
    def size(self) -> int:
        """Numbers per example."""
        return self.tail.out_size


class Identity:
    """Keeps every number."""

    def __init__(self, size: int) -> None:
        self.in_size = size
        self.out_size = size

    def apply(self, vectors: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch in"]:
        """Return the vectors themselves, not a copy."""
        return vectors

    def columns(self, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch out"]:
        """Return one-hot rows, float32."""
        return F.one_hot(ids, self.out_size).to(torch.float32)

    def adjoint(self, images: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch in"]:
        """Return the images themselves."""
        return images

    def apply_sparse(
        self, ids: Int[Tensor, "batch entry"], values: Float[Tensor, "batch entry"]
    ) -> Float[Tensor, "batch out"]:
        """Return dense vectors from some coordinates and their values; a repeated coordinate adds up."""
        return values.new_zeros(len(values), self.out_size).scatter_add_(1, ids, values)

    def to(self, device: torch.device) -> "Identity":  # noqa: ARG002
        """Return itself: nothing is stored."""
        return self


class Composed:
    """Several maps, the first one applied first."""

    def __init__(self, maps: Sequence[LinearMap]) -> None:
        self.maps = tuple(maps)
        self.in_size = self.maps[0].in_size
        self.out_size = self.maps[-1].out_size

    def apply(self, vectors: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Return the image under all maps."""
        for one in self.maps:
            vectors = one.apply(vectors)
        return vectors

    def columns(self, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch out"]:
        """Return the first map's columns, sent through the others."""
        images = self.maps[0].columns(ids)
        for one in self.maps[1:]:
            images = one.apply(images)
        return images

    def adjoint(self, images: Float[Tensor, "*batch out"]) -> Float[Tensor, "*batch in"]:
        """Apply the adjoints in the opposite order."""
        for one in reversed(self.maps):
            images = one.adjoint(images)
        return images

    def to(self, device: torch.device) -> "Composed":
        """Return every map on `device`."""
        return Composed([one.to(device) for one in self.maps])


def chain(size: int, maps: Sequence[LinearMap]) -> LinearMap:
    """Return one map for a sequence of maps on vectors of `size` numbers; identities vanish."""
    active = [one for one in maps if not isinstance(one, Identity)]
    if not active:
        return Identity(size)
    return active[0] if len(active) == 1 else Composed(active)
