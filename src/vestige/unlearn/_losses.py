"""Losses of examples and of sets of them, the same whatever they are batched with."""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import nn

from vestige.data import TokenizedData, make_batch, plan_batches
from vestige.gradients import CausalLoss, Reduction
from vestige.launch import step_done
from vestige.models import batch_sharing


class Losses:
    """Losses of the examples of a data set under a model as it is at the moment of asking.

    The loss of an example is the sum or mean over its own target tokens; the loss of a set is the sum over its examples
    divided by the sum of their `weights`: with `sum` that is the mean over all tokens of the set, and no mean of means.
    """

    def __init__(self, model: nn.Module, data: TokenizedData, reduction: Reduction, token_budget: int) -> None:
        self._model, self._data, self._budget = model, data, token_budget
        self._objective = CausalLoss(reduction)
        self.weights = loss_weights(data, reduction)

    def of(self, rows: Int[np.ndarray, "row"]) -> Float[np.ndarray, "row"]:
        """Measure the loss of each of the rows in nats, float64; not finite where the model is not."""
        found = np.zeros(len(rows))
        device = next(self._model.parameters()).device
        with torch.no_grad():
            for places in plan_batches(self._data.lengths[rows], self._budget, sharing=batch_sharing(self._model)):
                batch = make_batch(self._data, rows[places]).to(device)
                found[places] = self._objective.losses(self._model, batch).double().cpu().numpy()
                step_done(len(places))
        return found


def loss_weights(data: TokenizedData, reduction: Reduction) -> Float[np.ndarray, "example"]:
    """Return the weight of each example in the loss of a set: its target tokens for `sum`, else 1; 0 if it has none."""
    counts = data.target_counts
    return (counts if reduction == "sum" else counts > 0).astype(np.float64)
