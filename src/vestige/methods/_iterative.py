"""Influence functions with the inverse of the whole curvature, in steps that each take products with it."""

from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from vestige.curvature import (
    CurvatureKind,
    CurvatureProduct,
    absolute_damping,
    arnoldi,
    conjugate_gradient,
    largest_eigenvalue,
    lissa,
)
from vestige.errors import SpecError
from vestige.methods import ExactGradients, Job, Vectors, method
from vestige.methods._preconditioned import (
    ESTIMATES,
    Inverse,
    Preconditioned,
    curvature_product,
    leave_out_skipped,
    make_meaning,
)
from vestige.methods._refine import POWER_STEPS
from vestige.progress import announce

GAUSS_NEWTON = "Gauss-Newton matrix of all selected parameters together"

# Options of several methods.
KindOption = Annotated[CurvatureKind, "Which matrix of second derivatives."]
ExamplesOption = Annotated[PositiveInt | None, "Measure the curvature on N training examples; none: on all."]


def open_curvature(job: Job, kind: CurvatureKind, examples: int | None) -> tuple[CurvatureProduct, float]:
    """Return the curvature of all scored training data, or of `examples` of them, drawn with the job's seed; its unit.

    A damping of 1 is the mean eigenvalue of the empirical Fisher matrix of the same examples, which is known exactly:
    their mean squared gradient norm over the number of parameters.
    """
    data = leave_out_skipped(job)
    if examples is not None:
        data = data.subset(draw_rows(len(data), examples, job.settings.seed))
    measured = Job(data, job.queries, job.settings, job.loaded, job.selection)
    squared = sum(float(part.double().sum()) for _, part in ExactGradients(measured).compute_squared_norms())
    return curvature_product(job, data, kind), squared / max(len(data), 1) / sum(part.size for part in job.components)


def draw_rows(rows: int, count: int, seed: int) -> np.ndarray:
    """Draw `count` of the rows without repetition, in order; all of them when there are not more.

    Raises:
        SpecError: No row was requested.
    """
    if count < 1:
        raise SpecError(f"Curvature needs training examples to be measured on, and {count} were requested.")
    return np.sort(np.random.default_rng(seed).permutation(rows)[:count])


@method("cg")
@dataclass
class ConjugateGradient(Preconditioned):
    """Influence function with the whole Gauss-Newton matrix, solved in steps (Koh and Liang 2017, arXiv:1703.04730)."""

    meaning = make_meaning(
        normalisation=GAUSS_NEWTON,
        estimates=f"{ESTIMATES}; no approximation of the matrix, only of its inverse.",
        cost="A pass over the training data for each step, 20 by default, each with a second derivative for every "
        "query; the check on randomised weights and self-influence pay the same again.",
        limits="First order around one set of weights; stops after a number of steps, with the residual announced; "
        "the damping sets its scale, so compare within a run.",
    )
    steps: Annotated[PositiveInt, "Most passes over the training data."] = 20
    tolerance: Annotated[PositiveFloat, "Residual, relative to the query's gradient, at which to stop."] = 1e-3
    kind: KindOption = "gauss-newton"
    examples: ExamplesOption = None

    def inverse(self, job: Job) -> Inverse:
        """Return the map that solves for each set of vectors separately."""
        product, unit = open_curvature(job, self.kind, self.examples)

        def solve(vectors: Vectors, damping: float) -> Vectors:
            absolute, limits = absolute_damping(damping, unit), {"steps": self.steps, "tolerance": self.tolerance}
            solution = conjugate_gradient(product, torch.cat(vectors, dim=1), absolute, **limits)
            worst = float(solution.residuals.max())
            announce(f"Conjugate gradients: {solution.steps} steps, relative residual at most {worst:.1e}.")
            return product.split(solution.vectors)

        return solve


@method("lissa")
@dataclass
class Lissa(Preconditioned):
    """Influence function with the inverse summed up as a series (Agarwal et al. 2017, arXiv:1602.03943)."""

    meaning = make_meaning(
        normalisation=GAUSS_NEWTON,
        estimates=f"{ESTIMATES}; the inverse is a series cut off after a number of steps.",
        cost="A pass over the training data, or over a sample of it, for each step, 100 by default, each with a second "
        "derivative for every query; the check on randomised weights and self-influence pay the same again.",
        limits="Directions of little curvature converge last and are underrated by a short series; cg needs fewer "
        "passes for the same answer. First order; the damping sets its scale, so compare within a run.",
    )
    depth: Annotated[PositiveInt, "Terms of the series: passes over the training data, or over a sample of it."] = 100
    sample: Annotated[PositiveInt | None, "Take N other training examples at every step; none: all at every step."] = (
        None
    )
    scale: Annotated[
        PositiveFloat | None, "Divisor of the curvature; none: 1.5 times its largest eigenvalue, 4 times with a sample."
    ] = None
    kind: KindOption = "gauss-newton"

    def inverse(self, job: Job) -> Inverse:
        """Measure the scale once; return the map that runs a series of its own for each set of vectors."""
        product, unit = open_curvature(job, self.kind, None)
        seed, largest = job.settings.seed, 0.0
        if not self.scale:
            largest = largest_eigenvalue(product, product.random_vector(seed)[None], steps=POWER_STEPS)

        def multiply(step: int, vectors: Tensor) -> Tensor:
            if self.sample is None:
                return product(vectors)
            rows = draw_rows(len(job.train), self.sample, seed + step)
            return replace(product, data=job.train.subset(rows))(vectors)

        def solve(vectors: Vectors, damping: float) -> Vectors:
            absolute = absolute_damping(damping, unit)
            scale = self.scale or (1.5 if self.sample is None else 4.0) * (largest + absolute)
            return product.split(lissa(multiply, torch.cat(vectors, dim=1), absolute, scale=scale, depth=self.depth))

        return solve


@method("arnoldi")
@dataclass
class Arnoldi(Preconditioned):
    """Influence function in the span of dominant eigenvectors (Schioppa et al. 2022, arXiv:2112.03052)."""

    meaning = make_meaning(
        normalisation=f"dominant eigenvalues of the {GAUSS_NEWTON}",
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
    kind: KindOption = "gauss-newton"
    examples: ExamplesOption = None

    def inverse(self, job: Job) -> Inverse:
        """Find the eigenvectors once; return the map that projects every set of vectors on them."""
        product, unit = open_curvature(job, self.kind, self.examples)
        start = product.random_vector(job.settings.seed)
        pairs = arnoldi(product, start, steps=self.steps, rank=self.rank)
        return lambda vectors, damping: product.split(
            pairs.precondition(torch.cat(vectors, dim=1), absolute_damping(damping, unit))
        )
