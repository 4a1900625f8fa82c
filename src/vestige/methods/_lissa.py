"""Influence functions by LiSSA."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from vestige.curvature import CurvatureKind, largest_eigenvalue, lissa
from vestige.methods._preconditioned import ESTIMATES, UNIT, Preconditioned
from vestige.methods._prepared import HELPS
from vestige.methods._products import Problem, drawn_rows, problem
from vestige.methods._protocol import Job
from vestige.methods._registry import method
from vestige.methods._stores import Vectors
from vestige.runs import Meaning

POWER_STEPS = 8


@method("lissa")
@dataclass
class Lissa(Preconditioned):
    """Influence function with the inverse summed up as a series (Agarwal et al. 2017, arXiv:1602.03943)."""

    needs_exact = True
    meaning = Meaning(
        sign=HELPS,
        unit=UNIT,
        target="this model",
        normalisation="Gauss-Newton matrix of all selected parameters together",
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
    kind: Annotated[CurvatureKind, "Which matrix of second derivatives."] = "gauss-newton"

    def inverse(self, job: Job) -> Callable[[Vectors], Vectors]:
        """Measure the scale once; return the map that runs a series of its own for each set of vectors."""
        found = problem(job, self.name, self.kind, None)
        scale = self.scale or self._safe_scale(found, job.settings.seed)

        def product(step: int, vectors: Tensor) -> Tensor:
            if self.sample is None:
                return found.product(vectors)
            rows = drawn_rows(len(job.train), self.sample, job.settings.seed + step)
            return replace(found.product, data=job.train.subset(rows))(vectors)

        return lambda vectors: found.split(
            lissa(product, found.join(vectors), found.damping, scale=scale, depth=self.depth)
        )

    def _safe_scale(self, found: Problem, seed: int) -> float:
        largest = largest_eigenvalue(found.product, found.random_vector(seed)[None], steps=POWER_STEPS)
        return (1.5 if self.sample is None else 4.0) * (largest + found.damping)
