"""A compressor of another package: the first K numbers of each component's gradient."""

import torch
from torch import Tensor

from vestige.compress import Stream, compressor


class Head:
    """Keeps the first `out_size` of `in_size` numbers."""

    def __init__(self, in_size: int, out_size: int) -> None:
        self.in_size = in_size
        self.out_size = out_size

    def apply(self, vectors: Tensor) -> Tensor:
        """Return the image of each vector: [*, in_size] to [*, out_size]."""
        return vectors[..., : self.out_size]

    def columns(self, ids: Tensor) -> Tensor:
        """Return the images of the unit vectors `ids`: [*] to [*, out_size]."""
        return (ids.unsqueeze(-1) == torch.arange(self.out_size, device=ids.device)).float()

    def adjoint(self, images: Tensor) -> Tensor:
        """Return the images under the transposed map: [*, out_size] to [*, in_size]."""
        return torch.nn.functional.pad(images, (0, self.in_size - self.out_size))

    def to(self, device: torch.device) -> "Head":
        """Return the same map for tensors on `device`."""
        return self


@compressor("head", forms=("K", "AxB"), example="head:64")
def head(in_size: int, out_size: int, stream: Stream) -> Head:
    """Keep the first numbers; `stream` is where a random map would draw from."""
    return Head(in_size, out_size)
