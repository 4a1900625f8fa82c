"""How far the step goes along each component: learning rates, and what clipping made of the gradient."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vestige.errors import SpecError
from vestige.models import Component

PROBES = 4
"""Parameters watched at each end of the order of sizes."""


def component_rates(
    model: nn.Module, components: Sequence[Component], optimizer: Any, learning_rate: float | None
) -> list[float]:
    """Return the rate at which the next step moves each component; zero for one that the optimizer does not hold.

    Args:
        model: Owns the components' parameters.
        components: What is scored.
        optimizer: Anything with `param_groups`; read at this moment, so a scheduler's changes count.
        learning_rate: One rate for all, instead of the optimizer's.

    Raises:
        SpecError: neither is given.
    """
    if learning_rate is not None:
        return [float(learning_rate)] * len(components)
    if optimizer is None:
        raise SpecError(
            "The learning rate of the step is not known. Give the engine optimizer=..., or the step learning_rate=..."
        )
    rates: Mapping[int, float] = {
        id(parameter): float(group["lr"]) for group in optimizer.param_groups for parameter in group["params"]
    }
    return [rates.get(id(model.get_parameter(component.parameter)), 0.0) for component in components]


def common_rate(rates: Sequence[float]) -> float | None:
    """Return the one rate of all components, None where they differ."""
    return rates[0] if len(set(rates)) == 1 else None


class ScaleProbe:
    """Measures the factor by which `.grad` was multiplied after the backward pass: clipping, or undoing a loss scale.

    The norm of a few gradients is noted as soon as they are complete and compared with their norm later. Only factors
    common to all parameters are found, as `clip_grad_norm_` applies them.
    """

    def __init__(self, model: nn.Module, components: Sequence[Component]) -> None:
        names = dict.fromkeys(component.parameter for component in components)
        by_size = sorted((model.get_parameter(name) for name in names), key=lambda parameter: parameter.numel())
        self._parameters = by_size if len(by_size) < 2 * PROBES else by_size[:PROBES] + by_size[-PROBES:]
        self._before: dict[int, Tensor] = {}
        self._handles: list[RemovableHandle] = [
            parameter.register_post_accumulate_grad_hook(self._note) for parameter in self._parameters
        ]

    def _note(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._before[id(parameter)] = _norm(parameter.grad)

    def factor(self) -> float:
        """Return the factor; one where no gradient is left to compare."""
        pairs = [
            (self._before[id(parameter)], _norm(parameter.grad))
            for parameter in self._parameters
            if parameter.grad is not None and id(parameter) in self._before
        ]
        if not pairs:
            return 1.0
        before = math.hypot(*(float(first) for first, _ in pairs))
        after = math.hypot(*(float(second) for _, second in pairs))
        if not math.isfinite(before) or before == after or before == 0:
            return 1.0
        return after / before

    def remove(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()


def _norm(gradient: Tensor) -> Tensor:
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    return torch.linalg.vector_norm(values.detach(), dtype=torch.promote_types(values.dtype, torch.float32))
