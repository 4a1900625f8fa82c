"""DataInf: the inverses of single gradients' outer products averaged, instead of the inverse of their average."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from vestige.curvature._diagonal import absolute_damping
from vestige.curvature._fit import CurvatureData
from vestige.curvature._pieces import Pieces
from vestige.gradients import Factor, Side


class DataInf(NamedTuple):
    """The closed form of Kwon et al. (2024, arXiv:2310.00902), component by component.

        v  ->  (1/n) sum_i (g_i g_i^T + d I)^-1 v  =  (1/n) sum_i (v - g_i (g_i . v) / (d + |g_i|^2)) / d,

    over the examples i of the data, by Sherman and Morrison. It needs one pass over the data for each set of vectors.
    """

    measured: CurvatureData
    damping: tuple[float, ...]
    """Absolute, one for each component."""

    @classmethod
    def damped(cls, measured: CurvatureData, units: Sequence[float], damping: float) -> "DataInf":
        """Return the operator with a damping relative to the `units` of the components, those of `mean_eigenvalues`.

        Raises:
            SpecError: the damping is not above zero; the formula divides by it.
        """
        return cls(measured, tuple(absolute_damping(damping, unit) for unit in units))

    def precondition(self, vectors: Sequence[Float[Tensor, "query _n"]]) -> list[Float[Tensor, "query _n"]]:
        """Apply the formula, summed over all the data before anything is divided by its size."""
        sink = _DataInfSink([part.shape for part in self.measured.components], vectors, self.damping)
        self.measured.stream(sink, "DataInf")
        examples = max(sink.examples, 1)
        return [
            ((vector - total / examples) / damping).to(vector.dtype)
            for vector, total, damping in zip(vectors, sink.totals, self.damping, strict=True)
        ]


def fit_datainf(measured: CurvatureData, damping: float) -> DataInf:
    """Fit in one pass for the damping, which is relative to each component's mean eigenvalue, `mean |g|^2 / size`.

    Raises:
        SpecError: the damping is not above zero; the formula divides by it.
    """
    absolute_damping(damping, 1.0)
    return DataInf.damped(measured, mean_eigenvalues(measured), damping)


def mean_eigenvalues(measured: CurvatureData) -> tuple[float, ...]:
    """Return the mean eigenvalue of every component's empirical Fisher matrix, in one pass."""
    sink = _NormsSink([part.shape for part in measured.components])
    measured.stream(sink, "Gradient norms")
    pairs = zip(sink.squared, measured.components, strict=True)
    return tuple(total / max(sink.examples, 1) / part.size for total, part in pairs)


class _WholeGradients:
    """A sink that works on one component's whole gradients at a time."""

    def __init__(self, shapes: Sequence[tuple[int, int]]) -> None:
        self.pieces = Pieces(shapes)
        self.examples = 0

    def begin(self, examples: int, predicting: Tensor | None = None) -> None:  # noqa: ARG002
        """Start a batch."""
        self.pieces.begin(examples)
        self.examples += examples

    def reduce(self, component: int, side: Side, factor: Factor) -> Factor:  # noqa: ARG002
        """Keep the factor as it is."""
        return factor

    def accumulate(self, component: int, examples: slice, left: Factor, right: Tensor) -> None:
        """Keep the piece until the gradient is whole."""
        self.pieces.accumulate(component, examples, left, right)


class _NormsSink(_WholeGradients):
    """Sum of squared gradient norms, per component."""

    def __init__(self, shapes: Sequence[tuple[int, int]]) -> None:
        super().__init__(shapes)
        self.squared = [0.0] * len(shapes)

    def finish(self) -> None:
        """Square the batch's gradients."""
        for number in range(len(self.squared)):
            for _, gradients in self.pieces.take(number):
                self.squared[number] += float(gradients.double().square().sum())


class _DataInfSink(_WholeGradients):
    """`sum_i g_i (g_i . v) / (d + |g_i|^2)` for every vector v, per component."""

    def __init__(self, shapes: Sequence[tuple[int, int]], vectors: Sequence[Tensor], damping: Sequence[float]) -> None:
        super().__init__(shapes)
        self._vectors, self._damping = vectors, damping
        self.totals = [torch.zeros_like(vector) for vector in vectors]

    def finish(self) -> None:
        """Add the batch."""
        for number, (vectors, damping) in enumerate(zip(self._vectors, self._damping, strict=True)):
            for _, matrices in self.pieces.take(number):
                gradients = matrices.flatten(1).to(vectors.dtype)
                shares = (vectors @ gradients.T) / (damping + gradients.square().sum(1))
                self.totals[number] += shares @ gradients
