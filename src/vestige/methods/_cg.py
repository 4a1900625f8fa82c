"""Influence functions by conjugate gradients."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from pydantic import PositiveFloat, PositiveInt

from vestige.curvature import CurvatureKind, conjugate_gradient
from vestige.methods._preconditioned import ESTIMATES, UNIT, Preconditioned
from vestige.methods._prepared import HELPS
from vestige.methods._products import problem
from vestige.methods._protocol import Job
from vestige.methods._registry import method
from vestige.methods._stores import Vectors
from vestige.progress import announce
from vestige.runs import Meaning


@method("cg")
@dataclass
class ConjugateGradient(Preconditioned):
    """Influence function with the whole Gauss-Newton matrix, solved in steps (Koh and Liang 2017, arXiv:1703.04730)."""

    needs_exact = True
    meaning = Meaning(
        sign=HELPS,
        unit=UNIT,
        target="this model",
        normalisation="Gauss-Newton matrix of all selected parameters together",
        estimates=f"{ESTIMATES}; no approximation of the matrix, only of its inverse.",
        cost="A pass over the training data for each step, 20 by default, each with a second derivative for every "
        "query; the check on randomised weights and self-influence pay the same again.",
        limits="First order around one set of weights; stops after a number of steps, with the residual announced; "
        "the damping sets its scale, so compare within a run.",
    )
    steps: Annotated[PositiveInt, "Most passes over the training data."] = 20
    tolerance: Annotated[PositiveFloat, "Residual, relative to the query's gradient, at which to stop."] = 1e-3
    kind: Annotated[CurvatureKind, "Which matrix of second derivatives."] = "gauss-newton"
    examples: Annotated[PositiveInt | None, "Measure the curvature on N training examples; none: on all."] = None

    def inverse(self, job: Job) -> Callable[[Vectors], Vectors]:
        """Return the map that solves for each set of vectors separately."""
        found = problem(job, self.name, self.kind, self.examples)

        def solved(vectors: Vectors) -> Vectors:
            solution = conjugate_gradient(
                found.product, found.join(vectors), found.damping, steps=self.steps, tolerance=self.tolerance
            )
            worst = float(solution.residuals.max())
            announce(f"Conjugate gradients: {solution.steps} steps, relative residual at most {worst:.1e}.")
            return found.split(solution.vectors)

        return solved
