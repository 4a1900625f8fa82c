"""The first-order identity, tried on the given model: a small step up changes losses as their gradients say."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from vestige.data import TokenizedData
from vestige.errors import ModelError
from vestige.unlearn._ascent import ascend
from vestige.unlearn._losses import Losses
from vestige.unlearn._recipe import AscentRecipe, backward
from vestige.unlearn._weights import Weights

EXAMPLES = 16
"""Of each of the two sets: enough for the identity, which holds for any."""
_RISE = 1e-2
"""How much, in nats, the small step is to raise the loss by: far above rounding, small beside the loss."""
WRONG = 0.25
"""A step that moves the loss by a quarter more or less than its gradient says is not a step along that gradient."""


class Identity(NamedTuple):
    """Change of loss for each unit of step, over what the gradients say; 1 is right, -1 is descent."""

    own: float
    """For the set that is ascended: its squared gradient is positive, so this has a sign that cannot be doubted."""
    cross: float
    """For another set, as a cosine: its change over the product of the two gradients' lengths."""
    cosine: float
    """Of the two gradients: what `cross` should be."""

    @property
    def error(self) -> float:
        """The distance of both from what they should be."""
        return max(abs(self.own - 1), abs(self.cross - self.cosine))


def first_order_identity(
    weights: Weights,
    ascended: tuple[TokenizedData, Int[np.ndarray, "row"]],
    other: tuple[TokenizedData, Int[np.ndarray, "row"]],
    recipe: AscentRecipe,
) -> Identity:
    """Test one step of the scoring ascent, with plain SGD: (L(θ+Δ) - L(θ-Δ)) / 2η against <∇L, ∇L_ascended>.

    Raises:
        ModelError: They do not agree: the step goes the wrong way, or not as far as it should.
    """
    data, rows = ascended[0], _few(*ascended)
    length = _squared(_gradient(weights, data, rows, recipe))
    if length == 0:
        raise ModelError("The gradient of what is to be unlearnt is zero, so nothing would move. Is the model trained?")
    eta = _RISE / length
    step = AscentRecipe(
        eta, 1, len(rows), "sgd", reduction=recipe.reduction, token_budget=recipe.token_budget, seed=recipe.seed
    )
    own = _slope(weights, data, rows, (data, rows), step)
    others = other[0], _few(*other)
    left, right = _gradient(weights, *others, recipe), _gradient(weights, data, rows, recipe)
    scale = (_squared(left) * length) ** 0.5
    cross = _slope(weights, data, rows, others, step)
    found = Identity(own / length, cross / scale if scale else 0.0, _product(left, right) / scale if scale else 0.0)
    if not found.error <= WRONG:
        raise ModelError(_violated(found))
    return found


def _slope(
    weights: Weights,
    data: TokenizedData,
    rows: np.ndarray,
    measured: tuple[TokenizedData, np.ndarray],
    step: AscentRecipe,
) -> float:
    """Return the change of the measured loss per unit of step along the ascended set's gradient; even powers cancel."""
    losses = Losses(weights.model, measured[0], step.reduction, step.token_budget)
    counted = losses.weights[measured[1]].sum()
    done = ascend(weights, data, rows, lambda: losses.of(measured[1]), step)
    return float((done.after - done.mirrored).sum()) / counted / 2 / step.learning_rate


def _gradient(weights: Weights, data: TokenizedData, rows: np.ndarray, recipe: AscentRecipe) -> list[Tensor]:
    """Return the gradient of the set's loss by autograd alone, without the ascent."""
    backward(weights, data, rows, recipe)
    found = [parameter.grad for parameter in weights.parameters.values()]
    return [each.detach().clone() for each in found if each is not None]


def _squared(gradient: list[Tensor]) -> float:
    return _product(gradient, gradient)


def _product(left: list[Tensor], right: list[Tensor]) -> float:
    return float(sum(torch.sum(one.double() * other.double()) for one, other in zip(left, right, strict=True)))


def _few(data: TokenizedData, rows: np.ndarray) -> np.ndarray:
    return rows[data.target_counts[rows] > 0][:EXAMPLES]


def _violated(found: Identity) -> str:
    way = "down, not up: it would turn the sign of every score" if found.own < 0 else "not as its gradient says"
    return (
        f"The self-test failed: one small step moved the loss {way} (measured / expected: {found.own:.3f} for what is "
        f"unlearnt; for the other set {found.cross:.3f} against {found.cosine:.3f}). Weights in half precision round "
        "small steps away: try --precision float32. Otherwise the model's loss or backward pass is not what it seems."
    )
