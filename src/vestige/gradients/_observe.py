"""Taps on a model that trains: they watch an ordinary forward and backward pass and change no bit of it."""

from collections.abc import Callable, Sequence

from torch import nn

from vestige.errors import ModelError
from vestige.gradients._activated import activated_layers
from vestige.gradients._pass import _TAPS
from vestige.gradients._rules import Handle, Receive
from vestige.models import Component

CHANGING = ("relative_bias", "experts")
"""Kinds whose tap replaces a computation: the same numbers up to rounding, which is not the same bits."""


def observable(component: Component) -> bool:
    """Whether the gradient of a component can be watched without changing how it is computed."""
    return not any(use.kind in CHANGING for use in component.uses)


def observe(model: nn.Module, components: Sequence[Component], receive: Callable[[], Receive]) -> list[Handle]:
    """Taps on every use of the components; what they see goes where `receive()` says at the moment of the forward pass.

    Unlike `GradientPass`, which freezes the weights and runs a loss of its own, this leaves the flags, the loss and the
    backward pass to the caller. What a tap hands over is each example's share in the gradient of that loss, and the
    shares add up to the gradient that autograd writes into `.grad`.

    Raises:
        ModelError: a component is not `observable`.
    """
    taps: dict[str, dict[str, int]] = {}
    kinds: dict[str, str] = {}
    for number, component in enumerate(components):
        if not observable(component):
            raise ModelError(f"{component.name} cannot be watched while it trains. Leave it out of the components.")
        for use in component.uses:
            taps.setdefault(use.module, {})[use.role] = number
            kinds[use.module] = use.kind
    activated = next(
        (path for path, *_ in activated_layers(model) if any(name.startswith(path) for name in taps)), None
    )
    if activated is not None:
        raise ModelError(
            f"{activated} is an activated LoRA: it gathers the tokens of all examples, so none can be watched while it "
            "trains. Train it first, then use `vestige index` on the checkpoints."
        )
    handles: list[Handle] = []
    for path, roles in taps.items():
        handles += _TAPS[kinds[path]](model.get_submodule(path), roles, receive).attach()
    return handles
