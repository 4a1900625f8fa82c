"""The diagonal of the Fisher matrix: the mean square of every entry of the per-example gradient."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from vestige.curvature._pieces import Pieces
from vestige.errors import SpecError
from vestige.gradients import Factor, Side


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


class DiagonalSink:
    """Sums of squares of every entry of the gradients, `squares[c]` `[out, in]`, over the examples so far."""

    def __init__(self, shapes: Sequence[tuple[int, int]]) -> None:
        self._pieces = Pieces(shapes)
        self.squares: list[Tensor | None] = [None] * len(shapes)
        self.examples = 0

    def begin(self, examples: int) -> None:
        """Start a batch."""
        self._pieces.begin(examples)
        self.examples += examples

    def reduce(self, component: int, side: Side, factor: Factor) -> Factor:  # noqa: ARG002
        """Keep the factor as it is."""
        return factor

    def accumulate(self, component: int, examples: slice, left: Factor, right: Tensor) -> None:
        """Keep the piece until the gradient is whole."""
        self._pieces.accumulate(component, examples, left, right)

    def finish(self) -> None:
        """Square the batch's gradients."""
        for number in range(len(self.squares)):
            for _, gradients in self._pieces.take(number):
                total, sums = gradients.square().sum(0), self.squares[number]
                self.squares[number] = total if sums is None else sums.add_(total)

    def sums(self) -> dict[int, Float[Tensor, "_out _in"]]:
        """Return the sums of squares, for the matrices of which a gradient arrived."""
        return {number: sums for number, sums in enumerate(self.squares) if sums is not None}
