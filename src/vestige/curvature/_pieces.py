"""Factors of one batch, kept until every piece of every gradient has arrived."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from vestige.gradients import Factor, Side, materialise

CHUNK_NUMBERS = 2**25
"""Most numbers of whole gradients alive at once."""


class Pieces:
    """Whole per-example gradients of one matrix after another, a few examples at a time.

    A square needs the whole gradient: the uses of a tied weight and the chunks of a loss have cross terms. Only the
    factors are kept, which are smaller than the gradients as long as tokens are fewer than columns.
    """

    def __init__(self, shapes: Sequence[tuple[int, int]]) -> None:
        self.shapes = tuple(shapes)
        self._kept: list[list[tuple[slice, Factor, Tensor]]] = []
        self._examples = 0

    def begin(self, examples: int) -> None:
        """Start a batch."""
        self._examples = examples
        self._kept = [[] for _ in self.shapes]

    def reduce(self, component: int, side: Side, factor: Factor) -> Factor:  # noqa: ARG002
        """Keep the factor as it is."""
        return factor

    def accumulate(self, component: int, examples: slice, left: Factor, right: Tensor) -> None:
        """Keep the piece."""
        self._kept[component].append((examples, left, right))

    def take(self, number: int) -> Iterator[tuple[slice, Float[Tensor, "example out in"]]]:
        """Yield (examples, their gradients of matrix `number`), at least float32; its factors are dropped."""
        kept, self._kept[number] = self._kept[number], []
        if not kept:
            return
        shape = self.shapes[number]
        dtype = torch.promote_types(kept[0][2].dtype, torch.float32)
        step = max(1, CHUNK_NUMBERS // (shape[0] * shape[1]))
        for start in range(0, self._examples, step):
            wanted = slice(start, min(start + step, self._examples))
            total = torch.zeros(wanted.stop - start, *shape, dtype=dtype, device=kept[0][2].device)
            for examples, left, right in kept:
                _add(total, wanted, examples, left, right)
            yield wanted, total


def _add(total: Tensor, wanted: slice, examples: slice, left: Factor, right: Tensor) -> None:
    """Add the part of a piece that concerns the examples `wanted`."""
    first, last = max(wanted.start, examples.start), min(wanted.stop, examples.stop)
    if first >= last:
        return
    inside = slice(first - examples.start, last - examples.start)
    part = left[inside] if isinstance(left, Tensor) else left._replace(ids=left.ids[inside])
    total[first - wanted.start : last - wanted.start] += materialise(part, right[inside]).to(total.dtype)
