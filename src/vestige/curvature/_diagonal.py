"""Sinks of whole per-example gradients, and the diagonal of the Fisher matrix: the mean square of every entry."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from vestige.errors import SpecError
from vestige.gradients import Factor, FactorSink, materialise

CHUNK_NUMBERS = 2**25
"""Most numbers of whole gradients alive at once."""


def absolute_damping(damping: float, mean_eigenvalue: float) -> float:
    """Return `damping` times the mean eigenvalue; curvature that is zero throughout has no scale of its own and gets 1.

    Raises:
        SpecError: the damping is zero or negative: the inverse would divide by zero.
    """
    if not damping > 0:
        raise SpecError(
            f"The damping is {damping}, and the inverse of a curvature matrix needs one above zero. It is relative to "
            "the mean eigenvalue; type for example --damping 0.1."
        )
    return damping * mean_eigenvalue or 1.0


class WholeGradients(FactorSink, ABC):
    """A sink that hands on whole gradients, of one matrix after another and a few examples at a time.

    A square needs the whole gradient: the uses of a tied weight and the chunks of a loss have cross terms. Only the
    factors of a batch are kept, which are smaller than the gradients as long as tokens are fewer than columns.
    """

    def __init__(self, shapes: Sequence[tuple[int, int]]) -> None:
        self._shapes = tuple(shapes)
        self._kept: list[list[tuple[slice, Factor, Tensor]]] = []
        self._batch = self.examples = 0

    @abstractmethod
    def add(self, number: int, gradients: Float[Tensor, "example _out _in"]) -> None:
        """Add the gradients of matrix `number`, at least float32, of some examples of the batch."""

    def begin(self, examples: int, predicting: Tensor | None = None) -> None:  # noqa: ARG002
        """Start a batch."""
        self._batch, self._kept = examples, [[] for _ in self._shapes]
        self.examples += examples

    def accumulate(self, component: int, examples: slice, left: Factor, right: Tensor) -> None:
        """Keep the piece until the gradient is whole."""
        self._kept[component].append((examples, left, right))

    def finish(self) -> None:
        """Add the batch's gradients."""
        for number in range(len(self._shapes)):
            for gradients in self._take(number):
                self.add(number, gradients)

    def _take(self, number: int) -> Iterator[Float[Tensor, "example out in"]]:
        kept, self._kept[number] = self._kept[number], []
        if not kept:
            return
        shape, right = self._shapes[number], kept[0][2]
        step = max(1, CHUNK_NUMBERS // (shape[0] * shape[1]))
        for start in range(0, self._batch, step):
            stop = min(start + step, self._batch)
            dtype = torch.promote_types(right.dtype, torch.float32)
            total = torch.zeros(stop - start, *shape, dtype=dtype, device=right.device)
            for piece in kept:
                _add_piece(total, start, *piece)
            yield total


def _add_piece(total: Tensor, start: int, examples: slice, left: Factor, right: Tensor) -> None:
    """Add the part of a piece that concerns the examples of `total`, which begin at `start`."""
    first, last = max(start, examples.start), min(start + len(total), examples.stop)
    if first >= last:
        return
    inside = slice(first - examples.start, last - examples.start)
    part = left[inside] if isinstance(left, Tensor) else left._replace(ids=left.ids[inside])
    total[first - start : last - start] += materialise(part, right[inside]).to(total.dtype)


class DiagonalSink(WholeGradients):
    """Sums of squares of every entry, `squares[c]` `[out, in]`, of the matrices of which a gradient arrived."""

    def __init__(self, shapes: Sequence[tuple[int, int]]) -> None:
        super().__init__(shapes)
        self.squares: dict[int, Float[Tensor, "_out _in"]] = {}

    def add(self, number: int, gradients: Float[Tensor, "example _out _in"]) -> None:
        """Add the squares."""
        total = gradients.square().sum(0)
        self.squares[number] = self.squares[number].add_(total) if number in self.squares else total
