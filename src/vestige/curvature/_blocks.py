"""Blocks of curvature: a weight with its bias, a vector alone, an embedding by its diagonal."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from vestige.models import Component

BlockKind = Literal["matrix", "vector", "diagonal"]

_LINEAR_MAPS = {"linear", "conv1d", "experts", "router"}
"""Layers whose factors are output gradients and inputs, token by token; an expert's are those of its own tokens."""


class Block(NamedTuple):
    """Components that are preconditioned together.

    A layer with weight and bias is one matrix `[W | b]`: the bias is the last column, whose input is the constant one.
    """

    kind: BlockKind
    weight: int
    """Number of the component; of the vector, for a vector."""
    bias: int | None
    """Number of the bias in the last column, if any."""
    shape: tuple[int, int]
    """`(out, in)`, the bias column included."""

    def join(self, vectors: Sequence[Float[Tensor, "query _n"]]) -> Float[Tensor, "query out in"]:
        """Join one flat matrix per component into the block's matrices."""
        rows = self.shape[0]
        weight = vectors[self.weight].reshape(-1, rows, self.shape[1] - (self.bias is not None))
        return weight if self.bias is None else torch.cat([weight, vectors[self.bias].reshape(-1, rows, 1)], dim=2)

    def split(self, matrices: Float[Tensor, "query out in"]) -> dict[int, Float[Tensor, "query _n"]]:
        """Invert `join`: component number -> flat matrix."""
        if self.bias is None:
            return {self.weight: matrices.flatten(1)}
        return {self.weight: matrices[:, :, :-1].flatten(1), self.bias: matrices[:, :, -1]}


def find_blocks(components: Sequence[Component]) -> tuple[Block, ...]:
    """Return the blocks, in the order of their first component; every component is in exactly one."""
    biases = {
        component.uses[0].module: number
        for number, component in enumerate(components)
        if len(component.uses) == 1 and component.uses[0].role == "bias"
    }
    blocks, taken = [], set()
    for number, component in enumerate(components):
        kind = _kind(component)
        partner = biases.get(component.uses[0].module) if kind == "matrix" and len(component.uses) == 1 else None
        rows, columns = component.shape
        blocks.append(Block(kind, number, partner, (rows, columns + (partner is not None))))
        taken |= {partner}
    return tuple(block for block in blocks if block.weight not in taken)


def _kind(component: Component) -> BlockKind:
    if component.shape[1] > 1 and {use.kind for use in component.uses} <= _LINEAR_MAPS:
        return "matrix"
    # The inputs of an embedding are one-hot: their covariance has a row for every word of the vocabulary.
    return "vector" if component.shape[1] == 1 else "diagonal"
