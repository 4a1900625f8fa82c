"""Products of the Gauss-Newton matrix and of the Hessian with vectors, over all the data at once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import grad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from vestige.data import NO_TARGET, Batch, TokenizedData, make_batch, plan_batches
from vestige.gradients import Reduction
from vestige.models import Component, batch_sharing

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
            for batch in self._batches():
                for row, product in enumerate(self._of_batch(values, tangents, batch)):
                    totals[row] += self.flattened(product).to(totals.dtype)
        return totals / max(len(self.data), 1)

    def _batches(self) -> Iterator[Batch]:
        device = next(self.model.parameters()).device
        for rows in plan_batches(self.data.lengths, self.token_budget, sharing=batch_sharing(self.model)):
            yield make_batch(self.data, rows).to(device)

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
        parts = vector.split([component.size for component in self.components])
        found = []
        for component, part in zip(self.components, parts, strict=True):
            parameter = self.model.get_parameter(component.name)
            matrix = part.view(component.shape)
            found.append((matrix.T if _turned(component) else matrix).reshape(parameter.shape).to(parameter))
        return found

    def flattened(self, product: Sequence[Tensor]) -> Float[Tensor, "n"]:
        """Return tensors shaped as the components' parameters as one vector in the layout of the products."""
        pairs = zip(self.components, product, strict=True)
        return torch.cat([(part.T if _turned(component) else part).flatten() for component, part in pairs])


def _turned(component: Component) -> bool:
    """Return whether the parameter stores the transposed matrix, as GPT-2's Conv1D does."""
    return component.uses[0].kind == "conv1d" and component.shape[1] != 1 and component.uses[0].role == "weight"


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
