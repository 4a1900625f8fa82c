"""GREATS: which examples of a batch to train on, so that one step lowers the validation loss most."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import nn

from vestige.data import Batch
from vestige.errors import NonFinite, SpecError
from vestige.gradients import GradientPass, Objective, example_count
from vestige.models import Component
from vestige.online._sinks import FactorStore, ValidationGradient, products_among
from vestige.online._validation import as_inputs, quietly


class Selected(NamedTuple):
    """The chosen examples, in the order in which they were picked."""

    rows: list[int]
    """Positions in the batch."""
    gains: list[float]
    """Nats by which each pick lowers the validation loss, after those before it."""


def greedy_selection(
    gains: Float[torch.Tensor, "example"], overlaps: Float[torch.Tensor, "example example2"], k: int
) -> Selected:
    """Return the `k` examples that a greedy search picks: the best, then the best given the first, and so on.

    `gains[i] = eta <g_i, g_val>` and `overlaps[i, j] = eta^2 <g_i, g_j>`. After each pick p, `overlaps[i, p]` is taken
    from the gain of every other: two copies of one good example are worth less than twice one. This is GREATS (Wang et
    al. 2024, NeurIPS), the second-order expansion of the step's effect with the identity in place of the Hessian. Ties
    go to the earlier example.

    Raises:
        SpecError: `k` is not between 1 and the number of examples.
        NonFinite: a product is NaN or infinite.
    """
    if not 1 <= k <= len(gains):
        raise SpecError(f"k={k} of {len(gains)} examples: choose 1 to {len(gains)}.")
    bad = (~(gains.isfinite() & overlaps.isfinite().all(1))).nonzero().flatten().tolist()
    if bad:
        raise NonFinite(f"The gradients of the batch's examples {bad[:8]} (counted from 0) are not finite.")
    left, rows, values = gains.double().clone(), [], []
    for _ in range(k):
        best = int(left.argmax())
        rows.append(best)
        values.append(float(left[best]))
        left -= overlaps[:, best]
        left[rows] = -torch.inf
    return Selected(rows, values)


class Candidates:
    """Weighs the examples of a batch against a validation gradient in a pass of their own, weights frozen."""

    def __init__(
        self, model: nn.Module, objective: Objective, context: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        self._model, self._objective, self._context = model, objective, context

    def select(
        self,
        candidates: Any,
        k: int,
        components: Sequence[Component],
        rates: Sequence[float],
        validation: ValidationGradient,
    ) -> Selected:
        """Select the `k` best for a step on the mean of the chosen examples' losses.

        The share of an example in such a step is its own gradient over `k`, so that is what is weighed.
        """
        batch = as_inputs(candidates, self._objective)
        batch = batch.to(next(self._model.parameters()).device) if isinstance(batch, Batch) else batch
        count, store = example_count(batch), FactorStore(components)
        with quietly(self._model), self._context(), GradientPass(self._model, components, self._objective) as taken:
            taken.run(batch, store)
        gains = torch.zeros(count, dtype=torch.float64)
        overlaps = torch.zeros(count, count, dtype=torch.float64)
        for number, (rate, pieces) in enumerate(zip(rates, store.pieces, strict=True)):
            for piece in pieces:
                found = validation.products(number, piece.left, piece.right)
                gains[piece.examples] += rate / k * found.double().cpu()
            overlaps += (rate / k) ** 2 * products_among([pieces], count)
            pieces.clear()
        return greedy_selection(gains, overlaps, k)
