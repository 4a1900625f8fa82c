"""The sink for compressed gradients: one row an example, one run of columns a component."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from vestige.compress._apply import LeftFactor, ReducedFactor, RightFactor, combine, reduce_factor
from vestige.compress._types import Compressor
from vestige.gradients import Factor, Side
from vestige.timing import time_phase


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
