"""How weights climb, and the gradient that they climb by."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int

from vestige.data import TokenizedData, make_batch, plan_batches
from vestige.gradients import Reduction, token_losses
from vestige.launch import step_done
from vestige.models import batch_sharing
from vestige.settings import AscentOptimizer
from vestige.unlearn._losses import loss_weights
from vestige.unlearn._weights import Weights


@dataclass(frozen=True)
class AscentRecipe:
    """How the weights climb."""

    learning_rate: float
    steps: int
    batch_size: int
    optimizer: AscentOptimizer = "adam"
    momentum: float = 0.0
    """Of sgd and rmsprop."""
    reduction: Reduction = "sum"
    points: int = 1
    """How often the losses are measured, evenly over the steps and always at the last."""
    mirror: bool = True
    """Also measure the losses on the other side of the start, which separates slope from curvature."""
    seed: int = 0
    token_budget: int = 1024
    """Tokens in one pass; gradients of a larger batch are added up, which changes no step."""
    retain: int = 0
    """Training examples in each step that hold the ascent back; 0 for none."""
    accelerate: bool = False
    """Give steps Nesterov's momentum: towards a summit, where every step has the same examples or many of them."""

    @property
    def looks(self) -> list[int]:
        """The steps after which losses are measured."""
        count = min(self.points, self.steps)
        return sorted({round(self.steps * number / count) for number in range(1, count + 1)})


def backward(weights: Weights, data: TokenizedData, rows: Int[np.ndarray, "row"], recipe: AscentRecipe) -> float:
    """Set `grad` of every weight to the gradient of the rows' loss, whatever it held before; return that loss.

    The batch may be computed in several passes: its loss and gradient are sums over examples divided once.
    """
    for parameter in weights.parameters.values():
        parameter.grad = None
    counted = loss_weights(data, recipe.reduction)
    device = next(iter(weights.parameters.values())).device
    total, whole = 0.0, counted[rows].sum()
    for places in plan_batches(data.lengths[rows], recipe.token_budget, sharing=batch_sharing(weights.model)):
        part = rows[places]
        each = token_losses(weights.model, make_batch(data, part).to(device)).sum(1)
        if recipe.reduction == "mean":
            each = each / torch.from_numpy(np.maximum(data.target_counts[part], 1)).to(each)
        loss = each.sum() / whole
        loss.backward()
        total += loss.item()
        step_done(len(part))
    return total
