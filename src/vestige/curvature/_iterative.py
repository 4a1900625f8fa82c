"""Inverses of curvature without its matrix: conjugate gradients, LiSSA, Arnoldi, on nothing but products.

`product` maps vectors `[query, n]` to the curvature times each of them. It has to be the curvature of *all* the data
(or of one stated sample): the inverse of a sum is not the sum of the inverses of its parts.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from vestige.errors import NonFinite

Product = Callable[[Tensor], Tensor]


class Solution(NamedTuple):
    """Solutions and how good they are."""

    vectors: Float[Tensor, "query n"]
    residuals: Float[Tensor, "query"]
    """`|v - (C + d I) x| / |v|`."""
    steps: int


def conjugate_gradient(
    product: Product, vectors: Float[Tensor, "query n"], damping: float, *, steps: int, tolerance: float
) -> Solution:
    """Solve `(C + d I)^-1 v` by conjugate gradients (Hestenes and Stiefel 1952), each vector with its own step lengths.

    Stops when every residual is below `tolerance` of its vector, or after `steps` products.

    Raises:
        NonFinite: a direction of negative curvature was met, so the matrix is not positive definite.
    """
    found, residual = torch.zeros_like(vectors), vectors.clone()
    direction, lengths = residual.clone(), vectors.norm(dim=1)
    scale = torch.where(lengths > 0, lengths, 1.0)
    squared = residual.square().sum(1)
    taken = 0
    while taken < steps and bool((squared.sqrt() / scale > tolerance).any()):
        turned = product(direction) + damping * direction
        curvature = (direction * turned).sum(1)
        active = squared.sqrt() / scale > tolerance
        if not bool((curvature[active] > 0).all()):
            raise NonFinite(
                "Conjugate gradients met a direction of negative curvature: the damped matrix is not positive "
                "definite. Use Gauss-Newton products instead of the Hessian's, or a larger --damping."
            )
        step = torch.where(active, squared / torch.where(active, curvature, 1.0), 0.0)[:, None]
        found += step * direction
        residual -= step * turned
        before, squared = squared, residual.square().sum(1)
        direction = residual + (squared / torch.where(before > 0, before, 1.0))[:, None] * direction
        taken += 1
    return Solution(found, squared.sqrt() / scale, taken)


def largest_eigenvalue(product: Product, start: Float[Tensor, "1 n"], *, steps: int) -> float:
    """Return the largest absolute eigenvalue by power iteration: a lower bound, close after a few steps."""
    vector, size = start / start.norm(), 0.0
    for _ in range(steps):
        turned = product(vector)
        size = float(turned.norm())
        if size == 0:
            return 0.0
        vector = turned / size
    return size


def lissa(
    product: Callable[[int, Tensor], Tensor],
    vectors: Float[Tensor, "query n"],
    damping: float,
    *,
    scale: float,
    depth: int,
) -> Float[Tensor, "query n"]:
    """Solve `(C + d I)^-1 v` by `x <- v / s + x - (C x + d x) / s` (Agarwal et al. 2017, arXiv:1602.03943).

    The iteration sums a series. `product(step, x)` may take another sample of the data at every step: the expectation
    is the same. It converges when `scale` is above half the largest eigenvalue of `C + d I`; after k steps a direction
    of curvature c has reached the share `1 - (1 - (c + d) / scale)^(k + 1)` of its value.

    Raises:
        NonFinite: the series grows without bound, because `scale` is too small.
    """
    found = vectors / scale
    bound = 2 * vectors.norm(dim=1) / damping
    for step in range(depth):
        found = vectors / scale + found - (product(step, found) + damping * found) / scale
        # The solution of a positive definite system is no longer than |v| / d.
        if not bool((found.norm(dim=1) <= bound).all()):
            raise NonFinite(
                f"LiSSA diverges at step {step + 1}: the scale {scale:.3g} is below the curvature. Make the scale or "
                "the sample larger, or take the method cg."
            )
    return found


class Eigenpairs(NamedTuple):
    """A few eigenvalues and orthonormal eigenvectors, largest absolute value first."""

    values: Float[Tensor, "rank"]
    vectors: Float[Tensor, "rank n"]

    def precondition(self, vectors: Float[Tensor, "query n"], damping: float) -> Float[Tensor, "query n"]:
        """Return `sum_k e_k (e_k . v) / (lambda_k + d)`: the inverse inside their span, zero outside."""
        weights = (vectors @ self.vectors.T) / (self.values + damping)
        return weights @ self.vectors


def arnoldi(product: Product, start: Float[Tensor, "n"], *, steps: int, rank: int) -> Eigenpairs:
    """Return the dominant eigenpairs of a symmetric C from its Krylov space (Schioppa et al. 2022, arXiv:2112.03052).

    `steps` products build an orthonormal basis Q of `start, C start, ...`, orthogonalised twice; the eigenpairs of
    `Q^T C Q` with the `rank` largest absolute values are kept. Ends early when the space is exhausted.
    """
    basis, images = [start / start.norm()], []
    for _ in range(min(steps, len(start))):
        images.append(product(basis[-1][None])[0])
        known, fresh = torch.stack(basis), images[-1]
        for _again in range(2):
            fresh = fresh - known.T @ (known @ fresh)
        if float(fresh.norm()) <= 1e-6 * float(images[-1].norm()):
            break
        basis.append(fresh / fresh.norm())
    known = torch.stack(basis[: len(images)])
    projected = (known @ torch.stack(images).T).double()
    values, vectors = torch.linalg.eigh((projected + projected.T) / 2)
    order = values.abs().argsort(descending=True)[:rank]
    return Eigenpairs(values[order].to(start.dtype), vectors[:, order].T.to(start.dtype) @ known)
