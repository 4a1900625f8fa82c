"""One step of an optimizer, walked backward: from adjoints of the weights after it to those of the gradient and before.

Adjoints are derivatives of some final quantity, such as a query's loss under the trained weights, for several
quantities at once. The formulas are closed: no graph through the optimizer is kept. Metagradients (Engstrom et al.
2025, arXiv:2503.13751) use the same chain rule.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vestige.online import Rule

Tensors = dict[str, Tensor]

_CLIP_SLACK = 1e-6
"""What torch adds to the norm that it divides by when it clips."""


@dataclass(frozen=True)
class Moved:
    """One parameter in one step."""

    rule: Rule
    weight: Tensor
    """Before the step."""
    gradient: Tensor
    """That the optimizer was given: clipped, without weight decay."""
    first: Tensor | None = None
    """Mean of gradients after the step, of Adam."""
    second: Tensor | None = None
    """Mean of squared gradients after the step, of Adam."""

    def to(self, device: torch.device) -> "Moved":
        """Return the same, with its tensors on a device."""
        held = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **held)

    @property
    def penalised(self) -> Tensor:
        """The gradient with an L2 penalty, where the optimizer adds one."""
        decay = 0.0 if self.rule.decoupled else self.rule.decay
        return self.gradient + decay * self.weight if decay else self.gradient


class Adjoints:
    """Derivatives of several quantities with respect to weights and moments, each [quantity, *shape]."""

    def __init__(self, weights: Tensors, first: Tensors | None = None, second: Tensors | None = None) -> None:
        """Begin with the derivatives after the last step; the moments matter to nothing that comes after it."""
        self.weights = weights
        self.first = first if first is not None else {name: torch.zeros_like(each) for name, each in weights.items()}
        self.second = second if second is not None else {name: torch.zeros_like(each) for name, each in weights.items()}

    def step_back(self, moved: dict[str, Moved]) -> Tensors:
        """Go back before the optimizer's step; return the adjoints of the gradients that it was given.

        What a weight contributed through the gradient, the product with the Hessian, is for the caller to add.
        Parameters that are not in `moved` had no gradient and stayed as they were.
        """
        return {name: self._step_back(name, each) for name, each in moved.items()}

    def _step_back(self, name: str, moved: Moved) -> Tensor:
        rule = moved.rule
        change = self._adam(name, moved) if rule.betas is not None else self._momentum(name, rule)
        scale = rule.rate * rule.decay if rule.decoupled else 0.0
        if scale:
            self.weights[name] = self.weights[name] * (1 - scale)
        elif rule.decay and not rule.decoupled:
            self.weights[name] = self.weights[name] + rule.decay * change
        return change

    def _adam(self, name: str, moved: Moved) -> Tensor:
        rule = moved.rule
        assert rule.betas is not None
        assert moved.first is not None
        assert moved.second is not None
        (one, two), after = rule.betas, self.weights[name]
        unbias_one, unbias_two = 1 - one**rule.count, 1 - two**rule.count
        root = (moved.second / unbias_two).sqrt()
        divisor = root + rule.eps
        first = self.first[name] - after * (rule.rate / unbias_one / divisor)
        # Where no gradient ever was, the root has no derivative, and the mean it divides is zero as well.
        slope = torch.where(root > 0, moved.first / unbias_one / (divisor.square() * 2 * root * unbias_two), 0.0)
        second = self.second[name] + after * (rule.rate * torch.nan_to_num(slope))
        self.first[name], self.second[name] = one * first, two * second
        return (1 - one) * first + 2 * (1 - two) * moved.penalised * second

    def _momentum(self, name: str, rule: Rule) -> Tensor:
        direction = -rule.rate * self.weights[name]
        if not rule.momentum:
            return direction
        buffer = self.first[name] + (rule.momentum * direction if rule.nesterov else direction)
        begun = rule.count == 1
        change = buffer * (1.0 if begun else 1 - rule.dampening)
        self.first[name] = torch.zeros_like(buffer) if begun else rule.momentum * buffer
        return change + direction if rule.nesterov else change


def unclip(adjoints: Tensors, gradients: Tensors, norm: float, largest: float) -> Tensors:
    """Return the adjoints of gradients before their global norm was clipped.

    Args:
        adjoints: Of the clipped gradients, [quantity, *shape].
        gradients: The clipped ones.
        norm: Before clipping.
        largest: What the norm was clipped to; 0 does not clip.
    """
    if not largest or norm + _CLIP_SLACK <= largest:
        return adjoints
    count, scale = len(next(iter(adjoints.values()))), largest / (norm + _CLIP_SLACK)
    clipped = scale * norm
    # One quantity at a time: what it comes to does not depend on those beside it.
    along = torch.stack(
        [
            sum((torch.dot(one.flatten(), gradients[name].flatten()) for name, one in some), start=torch.zeros(()))
            for some in ([(name, each[number]) for name, each in adjoints.items()] for number in range(count))
        ]
    )
    # d(s g) = s (dg - h (h dg) n / (n + slack)), with h the direction of the gradient and n its norm.
    share = along / clipped**2 * (norm / (norm + _CLIP_SLACK))
    return {
        name: scale * (each - share.to(each.dtype).view(-1, *[1] * gradients[name].dim()) * gradients[name])
        for name, each in adjoints.items()
    }
