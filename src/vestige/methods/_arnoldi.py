"""Influence functions in the span of the dominant eigenvectors."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from pydantic import PositiveInt

from vestige.curvature import CurvatureKind, arnoldi
from vestige.methods._preconditioned import Preconditioned
from vestige.methods._prepared import HELPS
from vestige.methods._products import problem
from vestige.methods._protocol import Job
from vestige.methods._registry import method
from vestige.methods._stores import Vectors
from vestige.runs import Meaning


@method("arnoldi")
@dataclass
class Arnoldi(Preconditioned):
    """Influence function in the span of dominant eigenvectors (Schioppa et al. 2022, arXiv:2112.03052)."""

    needs_exact = True
    meaning = Meaning(
        sign=HELPS,
        unit="nats of query loss, times the number of training examples, up to the damping's scale",
        target="this model",
        normalisation="dominant eigenvalues of the Gauss-Newton matrix of all selected parameters together",
        estimates="The part of the influence function that lies in the span of the dominant eigenvectors.",
        cost="A pass with a second derivative over the training data for each step, 50 by default, once for all "
        "queries; memory for as many vectors of the size of the selected parameters.",
        limits="What lies outside the span is dropped, and that is where influence functions weigh most; the "
        "eigenvectors found last are rough. First order; compare within a run.",
    )
    steps: Annotated[PositiveInt, "Passes over the training data."] = 50
    rank: Annotated[
        PositiveInt, "Eigenvectors kept; about half of `steps`, since those found last have not converged."
    ] = 25
    kind: Annotated[CurvatureKind, "Which matrix of second derivatives."] = "gauss-newton"
    examples: Annotated[PositiveInt | None, "Measure the curvature on N training examples; none: on all."] = None

    def inverse(self, job: Job) -> Callable[[Vectors], Vectors]:
        """Find the eigenvectors once; return the map that projects every set of vectors on them."""
        found = problem(job, self.name, self.kind, self.examples)
        start = found.random_vector(job.settings.seed)
        pairs = arnoldi(found.product, start, steps=self.steps, rank=self.rank)
        return lambda vectors: found.split(pairs.precondition(found.join(vectors), found.damping))
