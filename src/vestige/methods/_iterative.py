"""Influence functions with the inverse of the whole curvature, in steps that each take products with it."""

from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
import torch
from jaxtyping import Float
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
from vestige.indexes import batch_tokens
from vestige.methods import ExactGradients, Job, Vectors, method
from vestige.methods._preconditioned import ESTIMATES, Inverse, Preconditioned, leave_out_skipped, make_meaning
from vestige.progress import announce

GAUSS_NEWTON = "Gauss-Newton matrix of all selected parameters together"
POWER_STEPS = 8
"""Of the search for the largest eigenvalue."""

# Options of several methods.
KindOption = Annotated[CurvatureKind, "Which matrix of second derivatives."]
ExamplesOption = Annotated[PositiveInt | None, "Measure the curvature on N training examples; none: on all."]


@dataclass(frozen=True)
class Problem:
    """The curvature of the training data, the unit of its damping, and the layout of its vectors."""

    product: CurvatureProduct
    unit: float
    """What a damping of 1 is."""

    def join(self, vectors: Vectors) -> Float[Tensor, "query n"]:
        """Return one flat vector for each query."""
        return torch.cat(vectors, dim=1)

    def split(self, vectors: Float[Tensor, "query n"]) -> Vectors:
        """Undo `join`."""
        return list(vectors.split([component.size for component in self.product.components], dim=1))

    def random_vector(self, seed: int) -> Float[Tensor, "n"]:
        """Draw normal numbers to start a search of eigenvectors from: on the CPU, the same on every device."""
        generator = torch.Generator().manual_seed(seed)
        size = sum(component.size for component in self.product.components)
        device = next(self.product.model.parameters()).device
        return torch.randn(size, generator=generator).to(device)


def problem(job: Job, method: str, kind: CurvatureKind, examples: int | None) -> Problem:
    """Return the curvature of all scored training data, or of `examples` of them, drawn with the job's seed.

    The damping is relative to the mean eigenvalue of the empirical Fisher matrix of the same examples, which is known
    exactly: their mean squared gradient norm over the number of parameters.
    """
    data = leave_out_skipped(job)
    if examples is not None:
        data = data.subset(draw_rows(len(data), examples, job.settings.seed))
    measured = Job(data, job.queries, job.settings, job.loaded, job.selection)
    loaded, size = job.model_for(method), sum(part.size for part in job.components)
    squared = sum(float(part.double().sum()) for _, part in ExactGradients(measured).compute_squared_norms())
    product = CurvatureProduct(
        loaded.model, job.components, data, batch_tokens(job.settings, loaded), job.settings.loss, kind
    )
    return Problem(product, squared / max(len(data), 1) / size)


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
        found = problem(job, self.name, self.kind, self.examples)

        def solve(vectors: Vectors, damping: float) -> Vectors:
            absolute, limits = absolute_damping(damping, found.unit), {"steps": self.steps, "tolerance": self.tolerance}
            solution = conjugate_gradient(found.product, found.join(vectors), absolute, **limits)
            worst = float(solution.residuals.max())
            announce(f"Conjugate gradients: {solution.steps} steps, relative residual at most {worst:.1e}.")
            return found.split(solution.vectors)

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
        found, seed = problem(job, self.name, self.kind, None), job.settings.seed
        start = None if self.scale else found.random_vector(seed)[None]
        largest = 0.0 if start is None else largest_eigenvalue(found.product, start, steps=POWER_STEPS)

        def product(step: int, vectors: Tensor) -> Tensor:
            if self.sample is None:
                return found.product(vectors)
            rows = draw_rows(len(job.train), self.sample, seed + step)
            return replace(found.product, data=job.train.subset(rows))(vectors)

        def solve(vectors: Vectors, damping: float) -> Vectors:
            absolute = absolute_damping(damping, found.unit)
            scale = self.scale or (1.5 if self.sample is None else 4.0) * (largest + absolute)
            return found.split(lissa(product, found.join(vectors), absolute, scale=scale, depth=self.depth))

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
        found = problem(job, self.name, self.kind, self.examples)
        start = found.random_vector(job.settings.seed)
        pairs = arnoldi(found.product, start, steps=self.steps, rank=self.rank)
        return lambda vectors, damping: found.split(
            pairs.precondition(found.join(vectors), absolute_damping(damping, found.unit))
        )
