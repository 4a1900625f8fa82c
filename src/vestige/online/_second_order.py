"""The second-order term of a step: how the examples' shares meet in the curvature of the validation loss."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vestige.curvature import CurvatureProduct
from vestige.gradients import CausalLoss
from vestige.models import Component, parameter_view
from vestige.online._sinks import Piece, products_with
from vestige.online._validation import Validation, quietly


class CurvatureTerm:
    """`1/2 (D g_i)^T H (D G)` for every example i of a step.

    D are the learning rates, H is the Hessian of the validation loss. A step of plain gradient descent moves the
    weights by `-D G`, with `G = sum_j g_j`, so by Taylor's expansion

        L(w) - L(w - D G) = sum_i <D g_i, grad L> - 1/2 sum_i (D g_i)^T H (D G) + O(D^3),

    and this is what example i's influence loses to second order. (In-Run Data Shapley, Wang et al. 2024,
    arXiv:2406.11011, writes the same for the change of the loss, with opposite signs.) Costs a Hessian-vector product
    on the validation data in each step, and the factors of the whole step stay in memory until its end.
    """

    def __init__(self, model: nn.Module, validation: Validation, token_budget: int) -> None:
        self._model, self._validation, self._token_budget = model, validation, token_budget
        self._data = validation.tokenized()

    def __call__(
        self,
        components: Sequence[Component],
        rates: Sequence[float],
        factor: float,
        pieces: Sequence[Sequence[Sequence[Piece]]],
        examples: Sequence[int],
    ) -> list[Float[Tensor, "example"]]:
        """Compute the term of every example, one tensor for each micro-batch; `.grad` holds the step's gradient.

        Args:
            components: What is scored.
            rates: Learning rate of each.
            factor: What the kept factors have to be multiplied by to add up to `.grad`.
            pieces: Micro-batch -> component -> kept factors.
            examples: Examples of each micro-batch.
        """
        bent = self._bent(components, rates)
        terms = []
        for batch, count in zip(pieces, examples, strict=True):
            total = torch.zeros(count, dtype=torch.float64)
            for component, (rate, matrix) in enumerate(zip(rates, bent, strict=True)):
                total += 0.5 * factor * rate * products_with(batch[component], matrix, count)
            terms.append(total)
        return terms

    def _bent(self, components: Sequence[Component], rates: Sequence[float]) -> list[Float[Tensor, "_out _in"]]:
        """Return `H D G`, one matrix for each component."""
        moved = []
        for component, rate in zip(components, rates, strict=True):
            gradient = self._model.get_parameter(component.parameter).grad
            if gradient is None:
                gradient = torch.zeros_like(self._model.get_parameter(component.parameter))
            moved.append(rate * parameter_view(self._model, component, stored=gradient).reshape(-1))
        objective = self._validation.objective
        assert isinstance(objective, CausalLoss)
        with quietly(self._model):
            product = CurvatureProduct(
                self._model, components, self._data, self._token_budget, objective.reduction, "hessian"
            )(torch.cat(moved)[None])[0]
        parts = product.split([component.size for component in components])
        return [part.view(component.shape) for part, component in zip(parts, components, strict=True)]
