"""EK-FAC's solution refined with products of the whole Gauss-Newton matrix, and how far each solves the system."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

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
    kind: Literal["cg", "neumann"]
    steps: int
    seed: int

    @classmethod
    def parse(cls, text: str, product: CurvatureProduct, curvature: KroneckerCurvature, seed: int) -> "Refinement":
        """Return the refinement that a text of `PATTERN` stands for, such as cg:10."""
        kind, _, steps = text.partition(":")
        return cls(product, curvature, "cg" if kind == "cg" else "neumann", int(steps), seed)

    def solve(self, vectors: Vectors, damping: float) -> tuple[Vectors, Residuals]:
        """Return the refined solutions.

        Raises:
            NonFinite: The Neumann steps led away from the solution.
        """
        sizes, whole = [part.size for part in self.product.components], torch.cat(vectors, dim=1)
        added = torch.cat(
            [
                whole.new_full((size,), one)
                for size, one in zip(sizes, self.curvature.absolute_dampings(damping), strict=True)
            ]
        )

        def precondition(flat: Float[Tensor, "query n"]) -> Float[Tensor, "query n"]:
            return torch.cat(self.curvature.precondition(list(flat.split(sizes, dim=1)), damping), dim=1)

        if self.kind == "cg":
            limits = {"steps": self.steps, "tolerance": TOLERANCE}
            found = conjugate_gradient(self.product, whole, added, precondition=precondition, **limits)
            solved, residuals = found.vectors, Residuals(float(found.begun.max()), float(found.residuals.max()))
        else:
            solved, residuals = self._sum_series(whole, added, precondition)
        return list(solved.split(sizes, dim=1)), residuals

    def _sum_series(
        self, vectors: Float[Tensor, "query n"], added: Float[Tensor, "n"], precondition: Callable[[Tensor], Tensor]
    ) -> tuple[Float[Tensor, "query n"], Residuals]:
        """Take each step on another part of the data, so that all steps together read it once."""
        data, random = self.product.data, np.random.default_rng(self.seed)
        parts = np.array_split(random.permutation(len(data)), min(self.steps, len(data)))
        products = [replace(self.product, data=data.subset(np.sort(part))) for part in parts]
        start = torch.randn(vectors.shape[1], generator=torch.Generator().manual_seed(self.seed)).to(vectors)
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
