"""How an optimizer moves the weights, by parameter, and what it multiplies a gradient by."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vestige.errors import SpecError
from vestige.models import Component, parameter_view

ScoreOptimizer = Literal["as-is", "sgd"]
"""How the steps of a training are scored: as its optimizer takes them, or as if it were plain gradient descent."""


@dataclass(frozen=True)
class Rule:
    """How one parameter was moved in one step; numbers as in torch.optim."""

    rate: float
    decay: float
    decoupled: bool
    """True for AdamW, whose decay does not pass through the moments."""
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    betas: tuple[float, float] | None = None
    """None for SGD."""
    eps: float = 0.0
    count: int = 1
    """Steps that this parameter has taken, this one included."""


def read_rule(optimizer: Any, group: dict[str, Any], state: dict[str, Any], way_out: str) -> Rule:
    """Return how a parameter of this group is going to be moved, before the step is taken.

    Args:
        optimizer: Of torch.
        group: Of its parameter groups, the one with the parameter.
        state: Of the parameter; empty before its first step.
        way_out: What the caller can do about an optimizer with another rule: the end of the message.

    Raises:
        SpecError: The optimizer's rule is none of AdamW's, Adam's and SGD's.
    """
    kind = type(optimizer)
    if group.get("maximize") or group.get("amsgrad"):
        raise SpecError(
            f"{kind.__name__} maximizes or is AMSGrad: its steps are none that Vestige can follow. {way_out}"
        )
    count = int(state.get("step", 0)) + 1
    if issubclass(kind, torch.optim.AdamW | torch.optim.Adam):
        decoupled = issubclass(kind, torch.optim.AdamW) or bool(group.get("decoupled_weight_decay"))
        return Rule(
            float(group["lr"]),
            float(group["weight_decay"]),
            decoupled,
            betas=(float(group["betas"][0]), float(group["betas"][1])),
            eps=float(group["eps"]),
            count=count,
        )
    if issubclass(kind, torch.optim.SGD):
        begun = state.get("momentum_buffer") is not None
        return Rule(
            float(group["lr"]),
            float(group["weight_decay"]),
            False,
            momentum=float(group["momentum"]),
            dampening=float(group["dampening"]),
            nesterov=bool(group["nesterov"]),
            count=2 if begun else 1,
        )
    raise SpecError(f"{kind.__name__} has steps that Vestige cannot follow: AdamW, Adam and SGD have. {way_out}")


def unwrap_optimizer(optimizer: Any) -> Any:
    """Return the optimizer of torch inside the one that accelerate puts around it."""
    return getattr(optimizer, "optimizer", optimizer)


class Preconditioner:
    """What the optimizer multiplies a gradient by in one step, elementwise, but for the learning rate.

    Adam and AdamW, with `v` the mean of squared gradients: `1 / (sqrt(v_t / (1 - b2^t)) + eps)`. Times the learning
    rate this is how far a gradient moves the weights in this and all later steps that its momentum reaches, were their
    denominators this step's; `(1 - b1) / (1 - b1^t)` of it in this step alone. SGD multiplies by nothing.
    """

    def __init__(
        self, model: nn.Module, components: Sequence[Component], optimizer: Any, score_optimizer: ScoreOptimizer
    ) -> None:
        """Read the optimizer's state as it is before the step.

        Raises:
            SpecError: Its steps are to be scored as they are, and its rule is not known.
        """
        self._model, self._components = model, components
        self._moments: list[tuple[Rule, Tensor | None] | None] = [None] * len(components)
        """Of Adam, by component: its rule, and the mean of squared gradients, None before the first step."""
        if optimizer is None or score_optimizer == "sgd":
            return
        inner = unwrap_optimizer(optimizer)
        groups = {parameter: group for group in inner.param_groups for parameter in group["params"]}
        for number, component in enumerate(components):
            parameter = model.get_parameter(component.parameter)
            if parameter in groups:
                state = inner.state.get(parameter, {})
                rule = read_rule(inner, groups[parameter], state, 'Score its steps with score_optimizer="sgd".')
                if rule.betas is not None:
                    self._moments[number] = rule, state.get("exp_avg_sq")

    @property
    def changes(self) -> bool:
        """True if it multiplies by anything."""
        return any(each is not None for each in self._moments)

    def scale(self, number: int, gradient: Float[Tensor, "out in"]) -> Float[Tensor, "out in"] | None:
        """Return what a gradient of the component `number` is multiplied by, None for nothing.

        The step's own gradient is a part of what it is divided by: in the first steps, and where a weight is touched
        for the first time, almost all of it.
        """
        moments = self._moments[number]
        if moments is None:
            return None
        (rule, squares), component = moments, self._components[number]
        assert rule.betas is not None
        beta = rule.betas[1]
        past = None if squares is None else parameter_view(self._model, component, stored=squares)
        if rule.decay and not rule.decoupled:
            gradient = gradient + rule.decay * parameter_view(self._model, component)
        own = (1 - beta) * gradient.square()
        mean = (own if past is None else beta * past + own) / (1 - beta**rule.count)
        return 1 / (mean.sqrt() + rule.eps)
