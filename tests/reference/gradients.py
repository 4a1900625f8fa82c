"""Per-example gradients by `torch.func`, one example at a time, without padding: slow, obvious, shares no code."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad


def example_loss(model: nn.Module, parameters: dict[str, Tensor], ids: Tensor, targets: Tensor, mean: bool) -> Tensor:
    """Cross-entropy of the target tokens of one unpadded sequence."""
    logits = functional_call(model, parameters, (ids[None],), tie_weights=True).logits[0]
    log_probabilities = torch.log_softmax(logits, -1)
    total = -sum(log_probabilities[t - 1, ids[t]] for t in range(1, len(ids)) if targets[t])
    return total / int(targets[1:].sum()) if mean else total


def example_gradients(model: nn.Module, ids: Tensor, targets: Tensor, mean: bool = False) -> dict[str, Tensor]:
    """Gradient of one example's loss for every parameter (tied ones once, under their first name)."""
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    return grad(lambda values: example_loss(model, values, ids, targets, mean))(parameters)


def loop_gradients(model: nn.Module, losses: Callable[[nn.Module, Any], Tensor], examples: list) -> list[dict]:
    """Plain autograd, one example a batch: the gradient of every parameter, tied ones once; unused ones are zero."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    rows = []
    for example in examples:
        for parameter in parameters:
            parameter.requires_grad_(True)
        (loss,) = losses(model, example)
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        rows.append(
            {
                name: torch.zeros_like(parameter) if gradient is None else gradient
                for name, parameter, gradient in zip(names, parameters, found, strict=True)
            }
        )
    return rows
