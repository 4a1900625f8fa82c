"""The identity map, and the composition of maps."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from vestige.compress._types import LinearMap


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
