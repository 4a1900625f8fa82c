"""What holds an ascent back: the loss of the training data, which is to stay as good as it was for everything else."""

from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from vestige.data import TokenizedData
from vestige.unlearn._recipe import AscentRecipe, backward
from vestige.unlearn._weights import Weights

_SAFETY = 4.0
"""Steps are this much shorter than the longest that is stable where every step has other examples."""
_POWER_STEPS = 8
_PROBE = 1e-3
"""Length of a probing step over that of the weights: far above rounding, and curvature stays the same."""


@final
class Momentum:
    """Nesterov's, whose coefficient follows from the number of steps alone: k / (k + 3) after k of them.

    On a quadratic n steps come as close as about n^2 plain ones: the error falls with 1 / (n + 1)^2, and no least
    curvature need be known (Nesterov 1983; Su, Boyd and Candès 2014, arXiv:1503.01243).
    """

    def __init__(self, weights: Weights) -> None:
        self._last = weights.copied()
        self._steps = 0

    def look_ahead(self, weights: Weights) -> None:
        """Move the weights on in the direction of the finished step, to where the next gradient is taken."""
        self._steps += 1
        now = weights.copied()
        with torch.no_grad():
            for name, parameter in weights.parameters.items():
                parameter.add_(now[name] - self._last[name], alpha=self._steps / (self._steps + 3))
        self._last = now


@dataclass(frozen=True)
class Retained:
    """Training data D that an ascent on Z is to leave as it is, apart from what Z itself means to it.

    What is climbed then is `L_Z(θ) - c [L_D(θ) - L_D(θ0) - <∇L_D(θ0), θ - θ0>]`, a Bregman divergence subtracted (the
    proximal objective of Bae et al. 2022, arXiv:2209.05364). Near the start its summit is at θ0 + H^-1 ∇L_Z / c with H
    the curvature of the training loss: the influence function, of which an ascent without it has the gradient alone.
    """

    data: TokenizedData
    rows: Int[np.ndarray, "row"]
    size: int
    """Examples that are drawn for each step."""
    pull: float
    """Learning rate times c: the share of a direction of curvature 1 that a step takes back."""

    def hold(self, weights: Weights, step: int, recipe: AscentRecipe) -> None:
        """Turn the gradients in `grad` into those of what is climbed; in the first step they are that already."""
        if step == 0:
            return
        climbed = _taken(weights)
        rows = self._drawn(np.random.default_rng([recipe.seed, step]))
        here = self._gradient(weights, rows, recipe)
        with weights.at_start():
            there = self._gradient(weights, rows, recipe)
        strength = self.pull / recipe.learning_rate
        for name, parameter in weights.parameters.items():
            if name in climbed or name in here:
                nothing = torch.zeros_like(parameter)
                pulled = here.get(name, nothing) - there.get(name, nothing)
                parameter.grad = climbed.get(name, nothing) - strength * pulled

    def _drawn(self, random: np.random.Generator) -> Int[np.ndarray, "row"]:
        return np.sort(random.choice(self.rows, min(self.size, len(self.rows)), replace=False))

    def _gradient(self, weights: Weights, rows: np.ndarray, recipe: AscentRecipe) -> dict[str, Tensor]:
        backward(weights, self.data, rows, recipe)
        return _taken(weights)

    @classmethod
    def measured(cls, weights: Weights, data: TokenizedData, recipe: AscentRecipe) -> "Retained":
        """Measure the largest stable pull: a quarter of the inverse of the largest curvature, by power iteration."""
        rows = np.flatnonzero(data.target_counts > 0)
        probe = cls(data, rows, recipe.retain, 0.0)
        return cls(data, rows, recipe.retain, 1 / (_SAFETY * probe.largest_curvature(weights, recipe)))

    def largest_curvature(self, weights: Weights, recipe: AscentRecipe) -> float:
        """Estimate the largest absolute eigenvalue of the loss's Hessian, from differences of gradients."""
        generator = torch.Generator().manual_seed(recipe.seed)
        lengths = [float(each.detach().double().square().sum()) for each in weights.parameters.values()]
        reach = _PROBE * max(sum(lengths) ** 0.5, 1.0)
        direction = {
            name: torch.randn(each.shape, generator=generator).to(each) for name, each in weights.parameters.items()
        }
        found = 0.0
        for number in range(_POWER_STEPS):
            scale = reach / _length(direction)
            rows = self._drawn(np.random.default_rng([recipe.seed, number]))
            with weights.moved(direction, scale):
                above = self._gradient(weights, rows, recipe)
            with weights.moved(direction, -scale):
                below = self._gradient(weights, rows, recipe)
            direction = {name: (above[name] - below[name]) / (2 * reach) for name in above}
            found = _length(direction)
        return found


def _taken(weights: Weights) -> dict[str, Tensor]:
    return {name: each.grad.detach().clone() for name, each in weights.parameters.items() if each.grad is not None}


def _length(vector: dict[str, Tensor]) -> float:
    return sum(float(part.double().square().sum()) for part in vector.values()) ** 0.5
