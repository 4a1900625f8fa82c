"""Second derivatives of the losses of a batch along directions in the space of weights."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vestige.data import Batch
from vestige.gradients._objective import token_losses


class Second(NamedTuple):
    """How the weighted loss of a batch, and its gradient, change along several directions."""

    losses: Float[Tensor, "example token"]
    derivatives: Float[Tensor, "direction example token"]
    """Inner product of each direction with the gradient of each token's loss, times the example's share."""
    products: dict[str, Tensor]
    """The Hessian of the weighted loss times each direction, by parameter, [direction, *shape]."""


def second_derivatives(
    model: nn.Module, batch: Batch, shares: Float[Tensor, "example 1"], directions: dict[str, Tensor]
) -> Second:
    """Return the derivatives along directions, by one forward pass and a double backward pass for each direction.

    The model keeps its mode: in training mode dropout falls as the random numbers of torch have it, once for all
    directions. Double backward is used rather than reverse over forward, in which torch takes the statistics of a
    layer norm for constants.

    Args:
        model: Any causal model.
        batch: The examples.
        shares: What each example's losses are multiplied with in the sum.
        directions: By name of parameter, [direction, *shape].
    """
    parameters = {name: model.get_parameter(name) for name in directions}
    # Only the composed attention can be differentiated twice.
    with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        losses = token_losses(model, batch)
        weights = torch.ones_like(losses, requires_grad=True)
        total = (losses * weights * shares).sum()
        gradients = torch.autograd.grad(total, [*parameters.values()], create_graph=True)
        count = len(next(iter(directions.values())))
        found = [
            torch.autograd.grad(
                gradients,
                [weights, *parameters.values()],
                [each[number] for each in directions.values()],
                retain_graph=number + 1 < count,
                allow_unused=True,
                materialize_grads=True,
            )
            for number in range(count)
        ]
    derivatives, *products = (torch.stack(column) for column in zip(*found, strict=True))
    return Second(losses.detach(), derivatives, dict(zip(parameters, products, strict=True)))
