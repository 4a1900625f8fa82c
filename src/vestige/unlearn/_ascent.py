"""One ascent: steps up the loss of a set of examples, and what that does to the losses of others."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vestige.data import TokenizedData, make_batch, plan_batches
from vestige.gradients import Reduction, token_losses
from vestige.launch import step_done
from vestige.models import shuffled_batches
from vestige.settings import AscentOptimizer
from vestige.unlearn._losses import loss_weights
from vestige.unlearn._weights import Weights

Measure = Callable[[], Float[np.ndarray, "measured"]]
"""Losses of the measured examples under the weights of the moment."""


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
    """How often the measured losses are looked at, evenly over the steps and always at the last."""
    mirror: bool = True
    """Also look at the losses on the other side of the start, which tells slope from curvature."""
    seed: int = 0
    token_budget: int = 1024
    """Tokens in one pass; gradients of a larger batch are added up, which changes no step."""

    @property
    def looks(self) -> list[int]:
        """The steps after which the measured losses are looked at."""
        count = min(self.points, self.steps)
        return sorted({round(self.steps * number / count) for number in range(1, count + 1)})


class Ascent(NamedTuple):
    """What one ascent did; everything is NaN from the step on at which the loss of a batch was not finite."""

    batch_loss: Float[Tensor, "step"]
    """Loss of each step's batch before the step: mean over its weights."""
    after: Float[Tensor, "point measured"]
    mirrored: Float[Tensor, "point measured"]
    """The same with weights as far on the other side of the start; without rows if not asked for."""


def ascend(
    weights: Weights, data: TokenizedData, rows: Int[np.ndarray, "row"], measure: Measure, recipe: AscentRecipe
) -> Ascent:
    """Climb the loss of `rows` from the start, measure on the way, and restore the weights.

    Each step is θ ← optimizer(θ, +∇L_batch), L_batch the sum of the losses of the batch's examples over their weights
    (Isonuma and Titov 2024, arXiv:2401.15241, Eq. 5); no clipping, no weight decay, no dropout.
    """
    batches = shuffled_batches(data, rows, recipe.batch_size, recipe.steps, recipe.seed)
    losses = torch.full((recipe.steps,), torch.nan, dtype=torch.float64)
    after: list[np.ndarray] = []
    mirrored: list[np.ndarray] = []
    try:
        optimizer = climbing_optimizer(weights.parameters.values(), recipe)
        for number, batch in enumerate(batches):
            losses[number] = backward(weights, data, batch, recipe)
            if not torch.isfinite(losses[number]):
                break
            optimizer.step()
            if number + 1 in recipe.looks:
                after.append(measure())
                if recipe.mirror:
                    with weights.mirrored():
                        mirrored.append(measure())
    finally:
        weights.restore()
    return Ascent(losses, _filled(after, recipe, measure), _filled(mirrored, recipe, measure, recipe.mirror))


def backward(weights: Weights, data: TokenizedData, rows: Int[np.ndarray, "row"], recipe: AscentRecipe) -> float:
    """The gradient of the rows' loss is in `grad` of every weight, whatever was there; returns that loss.

    The batch may be computed in several passes: its loss and gradient are sums over examples divided once.
    """
    for parameter in weights.parameters.values():
        parameter.grad = None
    counted = loss_weights(data, recipe.reduction)
    device = next(iter(weights.parameters.values())).device
    total, whole = 0.0, counted[rows].sum()
    for places in plan_batches(data.lengths[rows], recipe.token_budget):
        part = rows[places]
        each = token_losses(weights.model, make_batch(data, part).to(device)).sum(1)
        if recipe.reduction == "mean":
            each = each / torch.from_numpy(np.maximum(data.target_counts[part], 1)).to(each)
        loss = each.sum() / whole
        loss.backward()
        total += loss.item()
        step_done(len(part))
    return total


def climbing_optimizer(parameters: Iterable[torch.nn.Parameter], recipe: AscentRecipe) -> torch.optim.Optimizer:
    """An optimizer that adds what it would subtract: gradients stay those of the loss, so the sign is set once."""
    common: dict[str, Any] = {"lr": recipe.learning_rate, "maximize": True}
    chosen = list(parameters)
    match recipe.optimizer:
        case "adam":
            return torch.optim.Adam(chosen, betas=(0.9, 0.999), **common)
        case "rmsprop":
            return torch.optim.RMSprop(chosen, momentum=recipe.momentum, **common)
        case "adafactor":
            return torch.optim.Adafactor(chosen, weight_decay=0.0, **common)
        case "sgd":
            return torch.optim.SGD(chosen, momentum=recipe.momentum, **common)


def _filled(found: list[np.ndarray], recipe: AscentRecipe, measure: Measure, wanted: bool = True) -> Tensor:
    """The looks as [point, measured], NaN for those that were not reached."""
    if not wanted:
        return torch.zeros(0, 0, dtype=torch.float64)
    width = len(found[0]) if found else len(measure())
    missing = [np.full(width, np.nan)] * (len(recipe.looks) - len(found))
    return torch.from_numpy(np.stack([*found, *missing]))
