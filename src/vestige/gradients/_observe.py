"""Taps on a model that trains: they watch an ordinary forward and backward pass and change no bit of it."""

from collections.abc import Callable, Sequence

from torch import nn

from vestige.errors import ModelError
from vestige.gradients._activated import activated_layers
from vestige.gradients._function_uses import FunctionUses, table_of
from vestige.gradients._rules import Handle, Receive
from vestige.gradients._taps import attach_all, modules_of
from vestige.models import Component

CHANGING = ("relative_bias", "experts")
"""Kinds whose tap replaces a computation: the same numbers up to rounding, which is not the same bits."""


def observable(component: Component) -> bool:
    """Return whether the gradient of a component can be watched without changing how it is computed."""
    return not any(use.kind in CHANGING for use in component.uses)


def observe(
    model: nn.Module, components: Sequence[Component], receive: Callable[[], Receive], by_function: bool = False
) -> list[Handle]:
    """Place taps on every use of the components; `receive()` returns their sink at the moment of the forward pass.

    Unlike `GradientPass`, which freezes the weights and runs a loss of its own, this leaves the flags, the loss and the
    backward pass to the caller. What a tap hands over is each example's share in the gradient of that loss, and the
    shares add up to the gradient that autograd writes into `.grad`.

    Args:
        model: The model, whose own forward the caller runs.
        components: What is watched.
        receive: Where the factors go.
        by_function: Whether parameters are read outside the forward of their module, as `GradientPass.by_function`
            found: then every function of the model's forward is watched.

    Raises:
        ModelError: a component is not `observable`.
    """
    for component in components:
        if not observable(component):
            raise ModelError(f"{component.name} cannot be watched while it trains. Leave it out of the components.")
    modules = modules_of(model, components)
    activated = next(
        (path for path, *_ in activated_layers(model) if any(name.startswith(path) for name in modules)), None
    )
    if activated is not None:
        raise ModelError(
            f"{activated} is an activated LoRA: it gathers the tokens of all examples, so none can be watched while it "
            "trains. Train it first, then use `vestige index` on the checkpoints."
        )
    if not by_function:
        return attach_all(modules.values(), receive)
    uses = FunctionUses(table_of(model, components), receive)
    return [*attach_all(modules.values(), receive, uses), *uses.around(model)]
