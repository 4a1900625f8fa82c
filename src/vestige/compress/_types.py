"""The interface of compressors: three linear maps, so that compressing a sum is the sum of the compressed."""

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
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
