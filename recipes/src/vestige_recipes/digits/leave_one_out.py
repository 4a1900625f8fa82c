"""Leave-one-out on a convex model: what exact curvature predicts, beside models trained without the example."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, hessian

from vestige.curvature import FisherBlock, FisherBlocks
from vestige_recipes.digits.models import CLASSES, PIXELS, Digits, Images, gradients, losses_of

PENALTY = 0.01
_CONVERGED = 1e-11
_MOST_STEPS = 200


class LeftOut(NamedTuple):
    """Rise of every query's loss when an example is left out of training, in nats."""

    predicted: Float[np.ndarray, "query example"]
    true: Float[np.ndarray, "query example"]

    @property
    def agreement(self) -> float:
        """Pearson correlation over the examples, mean over queries."""
        pairs = zip(self.predicted, self.true, strict=True)
        return float(np.mean([np.corrcoef(predicted, true)[0, 1] for predicted, true in pairs]))


def leave_one_out(digits: Digits, count: int) -> LeftOut:
    """For the first `count` examples, of logistic regression `sum_i loss_i / n + PENALTY / 2 |w|^2`, in float64.

    Predicted: `g_query^T (H + PENALTY I)^-1 g_example / n`, H the Hessian of the mean loss (Koh and Liang 2017,
    arXiv:1703.04730). True: the weights that minimise the sum without the example, to the last digits.
    """
    train, queries = (images._replace(inputs=images.inputs.double()) for images in digits)
    model = nn.Linear(PIXELS, CLASSES, dtype=torch.float64)
    size = len(train.labels)
    everyone = torch.ones(size, dtype=torch.float64)
    weights = torch.zeros(PIXELS * CLASSES + CLASSES, dtype=torch.float64)
    curvature = _curvature(model, weights, train)
    # Newton's steps to the optimum, each with the curvature where it is.
    while float(_slope(model, weights, train, everyone).norm()) > _CONVERGED:
        weights = weights - _solved(curvature, _slope(model, weights, train, everyone))
        curvature = _curvature(model, weights, train)
    before = _losses(model, weights, queries)
    true = []
    for row in range(count):
        kept = everyone.clone()
        kept[row] = 0.0
        true.append(_losses(model, _refitted(model, weights, train, kept, curvature), queries) - before)
    model.load_state_dict(_named(weights))
    examples, asked = (torch.cat(gradients(model, images), dim=1) for images in (train.at(np.arange(count)), queries))
    predicted = curvature.precondition(asked, PENALTY) @ examples.T / size
    return LeftOut(predicted.numpy(), torch.stack(true, dim=1).numpy())


def _refitted(model: nn.Module, start: Tensor, train: Images, kept: Tensor, curvature: FisherBlocks) -> Tensor:
    """Return the optimum for the examples that are kept; the curvature of all of them points close enough to it."""
    inverse, weights = curvature.inverse(PENALTY), start
    for _ in range(_MOST_STEPS):
        slope = _slope(model, weights, train, kept)
        if float(slope.norm()) <= _CONVERGED:
            break
        weights = weights - inverse.apply(slope[None])[0]
    return weights


def _named(weights: Float[Tensor, "n"]) -> dict[str, Tensor]:
    matrix, bias = weights.split([PIXELS * CLASSES, CLASSES])
    return {"weight": matrix.view(CLASSES, PIXELS), "bias": bias}


def _losses(model: nn.Module, weights: Tensor, images: Images) -> Float[Tensor, "example"]:
    def moved(inputs: Tensor) -> Tensor:
        return functional_call(model, _named(weights), (inputs,))

    return losses_of(moved, images)  # type: ignore[arg-type]


def _slope(model: nn.Module, weights: Tensor, train: Images, kept: Float[Tensor, "example"]) -> Float[Tensor, "n"]:
    """Gradient of the mean loss of those that are kept, over the number of all, with the penalty."""
    probabilities = torch.softmax(functional_call(model, _named(weights), (train.inputs,)), 1)
    errors = (probabilities - nn.functional.one_hot(train.labels, CLASSES)) * kept[:, None] / len(kept)
    return torch.cat([(errors.T @ train.inputs).flatten(), errors.sum(0)]) + PENALTY * weights


def _curvature(model: nn.Module, weights: Tensor, train: Images) -> FisherBlocks:
    """Second derivatives of the mean loss; a damping is added to them as it is."""
    matrix = hessian(lambda at: _losses(model, at, train).mean())(weights)
    return FisherBlocks((FisherBlock("weights", matrix, unit=1.0),), (slice(0, len(weights)),))


def _solved(curvature: FisherBlocks, slope: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    return curvature.precondition(slope[None], PENALTY)[0]
