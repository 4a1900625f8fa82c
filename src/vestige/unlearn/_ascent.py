"""One ascent: steps up the loss of a set of examples, and what that does to the losses of others."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vestige.data import TokenizedData
from vestige.models import shuffle_batches
from vestige.unlearn._recipe import AscentRecipe, backward
from vestige.unlearn._retained import Momentum, Retained
from vestige.unlearn._weights import Weights

Measure = Callable[[], Float[np.ndarray, "measured"]]
"""Losses of the measured examples under the weights of the moment."""


class Ascent(NamedTuple):
    """What one ascent did; everything is NaN from the step on at which the loss of a batch was not finite."""

    batch_loss: Float[Tensor, "step"]
    """Loss of each step's batch before the step: mean over its weights."""
    after: Float[Tensor, "point measured"]
    mirrored: Float[Tensor, "point measured"]
    """The same with weights as far on the other side of the start; without rows if not requested."""


def ascend(
    weights: Weights,
    data: TokenizedData,
    rows: Int[np.ndarray, "row"],
    measure: Measure,
    recipe: AscentRecipe,
    retained: Retained | None = None,
) -> Ascent:
    """Climb the loss of `rows` from the start, measure on the way, and restore the weights.

    Each step is θ ← optimizer(θ, +∇L_batch), L_batch the sum of the losses of the batch's examples over their weights
    (Isonuma and Titov 2024, arXiv:2401.15241, Eq. 5); no clipping, no weight decay, no dropout. With `retained`, the
    loss of training data is held during the ascent; with `recipe.accelerate` steps have Nesterov's momentum.
    """
    batches = shuffle_batches(data, rows, recipe.batch_size, recipe.steps, recipe.seed)
    losses = torch.full((recipe.steps,), torch.nan, dtype=torch.float64)
    after: list[np.ndarray] = []
    mirrored: list[np.ndarray] = []
    try:
        momentum = Momentum(weights) if recipe.accelerate else None
        optimizer = climbing_optimizer(weights.parameters.values(), recipe)
        for number, batch in enumerate(batches):
            losses[number] = backward(weights, data, batch, recipe)
            if not torch.isfinite(losses[number]):
                break
            if retained is not None:
                retained.hold(weights, number, recipe)
            optimizer.step()
            if number + 1 in recipe.looks:
                after.append(measure())
                if recipe.mirror:
                    with weights.mirrored():
                        mirrored.append(measure())
            if momentum is not None:
                momentum.look_ahead(weights)
    finally:
        weights.restore()
    return Ascent(losses, _filled(after, recipe, measure), _filled(mirrored, recipe, measure, recipe.mirror))


def climbing_optimizer(parameters: Iterable[torch.nn.Parameter], recipe: AscentRecipe) -> torch.optim.Optimizer:
    """Return an optimizer that adds what it would subtract: gradients stay the loss's, so the sign is set once."""
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
    """Return the measurements as [point, measured], NaN for those that were not reached."""
    if not wanted:
        return torch.zeros(0, 0, dtype=torch.float64)
    width = len(found[0]) if found else len(measure())
    missing = [np.full(width, np.nan)] * (len(recipe.looks) - len(found))
    return torch.from_numpy(np.stack([*found, *missing]))
