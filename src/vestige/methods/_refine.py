"""EK-FAC's solution refined with products of the whole Gauss-Newton matrix, and how far each solves the system."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vestige.curvature import CurvatureProduct, KroneckerCurvature, conjugate_gradient, largest_eigenvalue, neumann
from vestige.errors import NonFinite
from vestige.methods._protocol import Vectors

PATTERN = r"(cg|neumann):[1-9][0-9]*"
TOLERANCE = 1e-3
"""Residual, relative to the query's gradient, at which conjugate gradients stop."""
POWER_STEPS = 8
"""Of the search for the largest eigenvalue."""


class Residuals(NamedTuple):
    """`|g - (G + D) x| / |g|`, the largest of all queries."""

    before: float
    """Of EK-FAC's own solution."""
    after: float


@dataclass(frozen=True)
class Refinement:
    """The system `(G + D) x = g`: G whole, D what EK-FAC adds to the diagonal of each layer."""

    product: CurvatureProduct
    """`G x`, as the mean over the training data."""
    curvature: KroneckerCurvature
    steps: str
    """What to do, of `PATTERN`, such as cg:10."""
    seed: int

    def solve(self, vectors: Vectors, damping: float) -> tuple[Vectors, Residuals]:
        """Return the refined solutions.

        Raises:
            NonFinite: The Neumann steps led away from the solution.
        """
        whole, dampings = torch.cat(vectors, dim=1), self.curvature.absolute_dampings(damping)
        added = torch.cat([whole.new_full(part.shape[1:], one) for part, one in zip(vectors, dampings, strict=True)])

        def precondition(flat: Float[Tensor, "query n"]) -> Float[Tensor, "query n"]:
            return torch.cat(self.curvature.precondition(self.product.split(flat), damping), dim=1)

        kind, _, steps = self.steps.partition(":")
        if kind == "cg":
            limits = {"steps": int(steps), "tolerance": TOLERANCE}
            found = conjugate_gradient(self.product, whole, added, precondition=precondition, **limits)
            solved, residuals = found.vectors, Residuals(float(found.begun.max()), float(found.residuals.max()))
        else:
            solved, residuals = self._sum_series(whole, added, precondition, int(steps))
        return self.product.split(solved), residuals

    def _sum_series(
        self,
        vectors: Float[Tensor, "query n"],
        added: Float[Tensor, "n"],
        precondition: Callable[[Tensor], Tensor],
        steps: int,
    ) -> tuple[Float[Tensor, "query n"], Residuals]:
        """Take each step on another part of the data, so that all steps together read it once."""
        data, random = self.product.data, np.random.default_rng(self.seed)
        parts = np.array_split(random.permutation(len(data)), min(steps, len(data)))
        products = [replace(self.product, data=data.subset(np.sort(part))) for part in parts]
        start = self.product.random_vector(self.seed).to(vectors)
        # Parts have larger eigenvalues than the whole, and it is a part that each step multiplies with.
        scale = largest_eigenvalue(
            lambda one: precondition(products[0](one) + added * one), start[None], steps=POWER_STEPS
        )
        solved = neumann(
            lambda step, found: products[step](found), vectors, added, precondition, scale=scale, steps=len(parts)
        )
        lengths = vectors.norm(dim=1)

        def residual(found: Float[Tensor, "query n"]) -> float:
            left = (vectors - self.product(found) - added * found).norm(dim=1)
            return float((left / torch.where(lengths > 0, lengths, 1.0)).max())

        residuals = Residuals(residual(precondition(vectors)), residual(solved))
        if not residuals.after <= max(1.0, 2 * residuals.before):
            raise NonFinite(
                f"Neumann steps led away from the solution: the residual rose from {residuals.before:.2g} to "
                f"{residuals.after:.2g}. Take fewer steps, each on more data, a larger --damping, or refine=cg:10."
            )
        return solved, residuals
