"""Inverses of curvature without its matrix: conjugate gradients, LiSSA, Arnoldi, DataInf; products to use them with.

A product maps vectors `[query, n]` to the curvature times each of them. It has to be the curvature of *all* the data
(or of one stated sample): the inverse of a sum is not the sum of the inverses of its parts.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import grad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from vestige.curvature._fisher import WholeGradients, absolute_damping
from vestige.curvature._fit import CurvatureData
from vestige.data import NO_TARGET, Batch, TokenizedData, make_batch, plan_batches
from vestige.errors import NonFinite
from vestige.gradients import Reduction
from vestige.models import Component, batch_sharing, parameter_view

Product = Callable[[Tensor], Tensor]


class Solution(NamedTuple):
    """Solutions and how good they are."""

    vectors: Float[Tensor, "query n"]
    residuals: Float[Tensor, "query"]
    """`|v - (C + d I) x| / |v|`."""
    begun: Float[Tensor, "query"]
    """The same of what the steps began with."""
    steps: int


Damping = float | Float[Tensor, "n"]
"""Added to the diagonal: one number, or one for each entry."""


def conjugate_gradient(
    product: Product,
    vectors: Float[Tensor, "query n"],
    damping: Damping,
    *,
    steps: int,
    tolerance: float,
    precondition: Product | None = None,
) -> Solution:
    """Solve `(C + d I)^-1 v` by conjugate gradients (Hestenes and Stiefel 1952), each vector with its own step lengths.

    Stops when every residual is below `tolerance` of its vector, or after `steps` products. With `precondition`, a
    symmetric positive definite approximation of the inverse, it begins at what that gives, for a product more, and
    every step is preconditioned: the error falls with each in the norm of the matrix, the residual mostly.

    Raises:
        NonFinite: a direction of negative curvature was met, so the matrix is not positive definite.
    """
    if precondition is None:
        found, residual = torch.zeros_like(vectors), vectors.clone()
    else:
        found = precondition(vectors)
        residual = vectors - product(found) - damping * found
    steered = residual if precondition is None else precondition(residual)
    direction, lengths = steered.clone(), vectors.norm(dim=1)
    scale = torch.where(lengths > 0, lengths, 1.0)
    squared = begun = residual.square().sum(1)
    weighed = (residual * steered).sum(1)
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
        step = torch.where(active, weighed / torch.where(active, curvature, 1.0), 0.0)[:, None]
        found += step * direction
        residual -= step * turned
        squared, before = residual.square().sum(1), weighed
        steered = residual if precondition is None else precondition(residual)
        weighed = (residual * steered).sum(1)
        direction = steered + (weighed / torch.where(before > 0, before, 1.0))[:, None] * direction
        taken += 1
    return Solution(found, squared.sqrt() / scale, begun.sqrt() / scale, taken)


def neumann(
    product: Callable[[int, Tensor], Tensor],
    vectors: Float[Tensor, "query n"],
    damping: Damping,
    precondition: Product,
    *,
    scale: float,
    steps: int,
) -> Float[Tensor, "query n"]:
    """Return `x` after `x <- x + P (v - (C + d I) x) / s` from `x = P v`, with P an approximation of the inverse.

    A preconditioned Neumann series (Wang et al. 2025, arXiv:2507.14740, ASTRA). `product(step, x)` may take another
    sample of the data at every step. It converges where `scale` is above half the largest eigenvalue of `P (C + d I)`.
    """
    found = precondition(vectors)
    for step in range(steps):
        found = found + precondition(vectors - product(step, found) - damping * found) / scale
    return found


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


CurvatureKind = Literal["gauss-newton", "hessian"]


@dataclass(frozen=True)
class CurvatureProduct:
    """`C v` with C the mean, over all examples of `data`, of the curvature of an example's loss.

    `gauss-newton`: `J^T H J` with J the derivative of the logits and H the Hessian of the cross-entropy in them. It is
    positive semi-definite and equals the true Fisher matrix. `hessian`: second derivatives of the loss, indefinite.
    Vectors are the components' canonical matrices, flattened one after another in their order.
    """

    model: nn.Module
    components: Sequence[Component]
    data: TokenizedData
    token_budget: int
    reduction: Reduction = "sum"
    kind: CurvatureKind = "gauss-newton"

    def __call__(self, vectors: Float[Tensor, "query n"]) -> Float[Tensor, "query n"]:
        """Return the product with every vector; one forward pass for all, and passes backward for each."""
        values = {
            component.name: self.model.get_parameter(component.name).detach().clone().requires_grad_()
            for component in self.components
        }
        tangents = [self._as_parameters(vector) for vector in vectors]
        totals = torch.zeros_like(vectors)
        # Only the composed attention can be differentiated twice.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            for rows in plan_batches(self.data.lengths, self.token_budget, sharing=batch_sharing(self.model)):
                batch = make_batch(self.data, rows).to(next(self.model.parameters()).device)
                for row, product in enumerate(self._of_batch(values, tangents, batch)):
                    totals[row] += self.flatten(product).to(totals.dtype)
        return totals / max(len(self.data), 1)

    def split(self, vectors: Float[Tensor, "*query n"]) -> list[Float[Tensor, "*query _n"]]:
        """Return the part of each component."""
        return list(vectors.split([component.size for component in self.components], dim=-1))

    def random_vector(self, seed: int) -> Float[Tensor, "n"]:
        """Draw normal numbers to start a search of eigenvectors from: on the CPU, the same on every device."""
        size, generator = sum(component.size for component in self.components), torch.Generator().manual_seed(seed)
        return torch.randn(size, generator=generator).to(next(self.model.parameters()).device)

    def _of_batch(
        self, values: dict[str, Tensor], tangents: Sequence[Sequence[Tensor]], batch: Batch
    ) -> Iterator[Sequence[Tensor]]:
        """Yield sums over the batch's examples, one for each tangent."""
        mask = batch.labels[:, 1:] != NO_TARGET
        logits = functional_call(self.model, values, (), {"input_ids": batch.input_ids, "use_cache": False}).logits
        chosen = logits[:, :-1][mask]
        chosen = chosen.to(torch.promote_types(chosen.dtype, torch.float32))
        weights = torch.ones_like(mask, dtype=chosen.dtype)
        if self.reduction == "mean":
            weights = weights / mask.sum(1, keepdim=True).clamp(min=1)
        of_kind = _gauss_newton if self.kind == "gauss-newton" else _hessian
        return of_kind(chosen, batch.labels[:, 1:][mask], weights[mask], list(values.values()), tangents)

    def _as_parameters(self, vector: Float[Tensor, "n"]) -> list[Tensor]:
        """Return a flat vector in the parameters' own layout and dtype."""
        found = []
        for component, part in zip(self.components, self.split(vector), strict=True):
            found.append(torch.zeros_like(self.model.get_parameter(component.name)))
            parameter_view(self.model, component, found[-1]).copy_(part.view(component.shape))
        return found

    def flatten(self, product: Sequence[Tensor]) -> Float[Tensor, "n"]:
        """Return tensors shaped as the components' parameters as one vector in the layout of the products."""
        pairs = zip(self.components, product, strict=True)
        return torch.cat([parameter_view(self.model, one, part.contiguous()).flatten() for one, part in pairs])


def _gauss_newton(
    logits: Float[Tensor, "position vocabulary"],
    labels: Tensor,  # noqa: ARG001
    weights: Float[Tensor, "position"],
    parameters: Sequence[Tensor],
    tangents: Sequence[Sequence[Tensor]],
) -> Iterator[Sequence[Tensor]]:
    """Yield `J^T H J v`, with `J v` as the derivative of `u -> J^T u`, which respects an embedding's untrained row."""
    dummy = torch.zeros_like(logits, requires_grad=True)
    pulled = grad(logits, parameters, dummy, create_graph=True, allow_unused=True)
    probabilities = torch.softmax(logits.detach(), -1)
    kept = [number for number, part in enumerate(pulled) if part is not None and part.requires_grad]
    for tangent in tangents:
        pushed = grad([pulled[n] for n in kept], dummy, [tangent[n] for n in kept], retain_graph=True)[0]
        inner = (probabilities * pushed).sum(-1, keepdim=True)
        bent = weights[:, None] * probabilities * (pushed - inner)
        yield grad(logits, parameters, bent, retain_graph=True, allow_unused=True, materialize_grads=True)


def _hessian(
    logits: Float[Tensor, "position vocabulary"],
    labels: Tensor,
    weights: Float[Tensor, "position"],
    parameters: Sequence[Tensor],
    tangents: Sequence[Sequence[Tensor]],
) -> Iterator[Sequence[Tensor]]:
    """Yield the derivative of the gradient along each tangent."""
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    slopes = grad((losses * weights).sum(), parameters, create_graph=True, allow_unused=True)
    kept = [number for number, part in enumerate(slopes) if part is not None and part.requires_grad]
    for tangent in tangents:
        yield grad(
            [slopes[n] for n in kept],
            parameters,
            [tangent[n] for n in kept],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )


class DataInf(NamedTuple):
    """The closed form of Kwon et al. (2024, arXiv:2310.00902), component by component.

        v  ->  (1/n) sum_i (g_i g_i^T + d I)^-1 v  =  (1/n) sum_i (v - g_i (g_i . v) / (d + |g_i|^2)) / d,

    over the examples i of the data, by Sherman and Morrison: the inverses of single gradients' outer products averaged,
    instead of the inverse of their average. It needs one pass over the data for each set of vectors.
    """

    measured: CurvatureData
    damping: tuple[float, ...]
    """Absolute, one for each component."""

    @classmethod
    def with_damping(cls, measured: CurvatureData, units: Sequence[float], damping: float) -> "DataInf":
        """Return the operator with a damping relative to the `units` of the components, those of `mean_eigenvalues`.

        Raises:
            SpecError: the damping is not above zero; the formula divides by it.
        """
        return cls(measured, tuple(absolute_damping(damping, unit) for unit in units))

    def precondition(self, vectors: Sequence[Float[Tensor, "query _n"]]) -> list[Float[Tensor, "query _n"]]:
        """Apply the formula, summed over all the data before anything is divided by its size."""
        totals = [torch.zeros_like(vector) for vector in vectors]

        def add(number: int, gradients: Float[Tensor, "example _out _in"]) -> None:
            flat = gradients.flatten(1).to(vectors[number].dtype)
            shares = (vectors[number] @ flat.T) / (self.damping[number] + flat.square().sum(1))
            totals[number] += shares @ flat

        sink = WholeGradients([part.shape for part in self.measured.components], add)
        self.measured.stream(sink, "DataInf")
        examples = max(sink.examples, 1)
        return [
            ((vector - total / examples) / damping).to(vector.dtype)
            for vector, total, damping in zip(vectors, totals, self.damping, strict=True)
        ]


def mean_eigenvalues(measured: CurvatureData) -> tuple[float, ...]:
    """Return the mean eigenvalue of every component's empirical Fisher matrix, in one pass."""
    squared = [0.0] * len(measured.components)

    def add(number: int, gradients: Float[Tensor, "example _out _in"]) -> None:
        squared[number] += float(gradients.double().square().sum())

    sink = WholeGradients([part.shape for part in measured.components], add)
    measured.stream(sink, "Gradient norms")
    pairs = zip(squared, measured.components, strict=True)
    return tuple(total / max(sink.examples, 1) / part.size for total, part in pairs)
