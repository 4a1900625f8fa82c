"""The empirical Fisher matrix of compressed gradients, one block per component, and its damped inverse.

With compressed gradients g_i [k] of n examples, `F = (1/n) sum_i g_i g_i^T` (uncentred). Influence preconditions the
*query*: `(F + d I)^-1 q`, so a change of damping rewrites nothing on disk.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from vestige.errors import NonFinite

AUTO = "auto"
Damping = float | Literal["auto"]
"""Damping relative to the mean eigenvalue of a block, or "auto": chosen per block by `shrinkage`."""

LARGEST_RELATIVE = 1e3
SMALLEST_RELATIVE = 1e-6
"""Bounds of the automatic damping: beyond the first a block is the identity in effect, below the second singular."""


class FisherBlock(NamedTuple):
    """One component's Fisher matrix."""

    name: str
    matrix: Float[Tensor, "k k"]
    fourth_moment: float
    """Mean over examples of `|g|^4`: says how well the matrix is known from so many examples."""
    examples: int

    @property
    def mean_eigenvalue(self) -> float:
        """Trace over size: the unit of relative damping."""
        return float(self.matrix.diagonal().double().mean())

    def shrinkage(self) -> float:
        """Relative damping that minimises the expected squared error of the damped matrix, without any label.

        Ledoit and Wolf (2004, A well-conditioned estimator for large-dimensional covariance matrices): the best
        mixture `(1 - rho) F + rho m I` with m the mean eigenvalue has `rho = min(b, d) / d`, where d = |F - m I|^2 and
        b = (mean |g|^4 - |F|^2) / n estimates the sampling error of F. It equals damping by `rho / (1 - rho)` times m,
        up to a factor that no ranking feels. Few examples or heavy tails: much damping.
        """
        squared = float(self.matrix.double().square().sum())
        size = self.matrix.shape[0]
        distance = squared - size * self.mean_eigenvalue**2
        error = max(self.fourth_moment - squared, 0.0) / self.examples
        if distance <= 0 or error >= distance:
            return LARGEST_RELATIVE
        weight = error / distance
        return min(max(weight / (1 - weight), SMALLEST_RELATIVE), LARGEST_RELATIVE)

    def damped(self, damping: Damping) -> Float[Tensor, "k k"]:
        """`F + d I` in float64, d relative to the mean eigenvalue."""
        relative = self.shrinkage() if damping == AUTO else float(damping)
        # A component whose gradients are all zero has no scale of its own: any damping leaves it at zero.
        absolute = relative * self.mean_eigenvalue or 1.0
        return self.matrix.double() + absolute * torch.eye(
            len(self.matrix), dtype=torch.float64, device=self.matrix.device
        )


@dataclass(frozen=True)
class FisherBlocks:
    """Block-diagonal Fisher matrix: block `c` acts on the columns `columns[c]` of a compressed gradient."""

    blocks: tuple[FisherBlock, ...]
    columns: tuple[slice, ...]

    def precondition(self, vectors: Float[Tensor, "query column"], damping: Damping) -> Float[Tensor, "query column"]:
        """`(F + d I)^-1 q` for every query, block by block.

        Raises:
            NonFinite: a block is not positive definite even when damped; names the component.
        """
        solved = torch.empty_like(vectors)
        for block, columns in zip(self.blocks, self.columns, strict=True):
            factor = _cholesky(block, damping)
            solved[:, columns] = torch.cholesky_solve(vectors[:, columns].double().T, factor).T.to(vectors.dtype)
        return solved

    def whitener(self, damping: Damping) -> list[Float[Tensor, "k k"]]:
        """Matrices W with `|W g|^2 = g^T (F + d I)^-1 g`: the inverse Cholesky factors, float32."""
        factors = []
        for block in self.blocks:
            factor = _cholesky(block, damping)
            identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
            factors.append(torch.linalg.solve_triangular(factor, identity, upper=False).float())
        return factors


def _cholesky(block: FisherBlock, damping: Damping) -> Float[Tensor, "k k"]:
    factor, failed = torch.linalg.cholesky_ex(block.damped(damping))
    if int(failed):
        raise NonFinite(
            f"The Fisher matrix of {block.name} is singular at --damping {damping}. Type a larger one, such as "
            "--damping 0.1, or leave it at auto."
        )
    return factor


def accumulate_fisher(
    names: Sequence[str], columns: Sequence[slice], blocks: Iterable[Float[Tensor, "row column"]]
) -> FisherBlocks:
    """Fisher blocks from a stream of compressed gradients; memory is the blocks alone."""
    sums = [torch.zeros(part.stop - part.start, part.stop - part.start) for part in columns]
    fourth = torch.zeros(len(columns), dtype=torch.float64)
    examples = 0
    for gradients in blocks:
        examples += len(gradients)
        for number, part in enumerate(columns):
            piece = gradients[:, part]
            sums[number].addmm_(piece.T, piece)
            fourth[number] += piece.double().square().sum(1).square().sum()
    found = tuple(
        FisherBlock(name, total / max(examples, 1), float(moment) / max(examples, 1), examples)
        for name, total, moment in zip(names, sums, fourth, strict=True)
    )
    return FisherBlocks(found, tuple(columns))
