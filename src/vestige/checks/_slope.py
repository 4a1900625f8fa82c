"""Gradients against finite differences: does the loss move as the gradient says when the weights move?"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vestige.checks._types import Check, Verdict
from vestige.data import Batch
from vestige.gradients import BothSinks, CausalLoss, DotSink, GradientPass, NormSink
from vestige.models import Component, parameter_view

MOST_PARAMETERS = 150_000_000
"""A direction and a copy of the moved weights are held in memory: larger models are checked on some components."""
STEPS = {
    torch.float32: (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4),
    torch.float64: (1e-2, 1e-3, 1e-4, 1e-5, 1e-6),
}
"""Relative to the weights. Too long a step leaves the tangent (at a ReLU's kink soon), too short a one drowns in
rounding."""
_GOOD, _BAD, _UNSURE = 0.01, 0.1, 0.05
"""Shares of a typical slope. In float32 a loss of 100 nats is known to 1e-5, so a difference over a step of 1e-3 is
known to 1e-2; what neighbouring steps disagree by is tolerated three times on top."""


class Slope(NamedTuple):
    """A directional derivative, computed twice."""

    gradient: float
    """`<gradient, direction>`, from the factors."""
    difference: float
    """`(loss(w + h d) - loss(w - h d)) / 2h`, at the step that agrees best with the next longer and shorter ones."""
    doubt: float
    """How far the farther of those two is away."""
    typical: float
    """Standard deviation of the slope over random directions; the unit of all three."""
    components: int
    parameters: int
    silent: tuple[str, ...]
    """Components whose gradient is zero."""


def check_slope(model: nn.Module, components: Sequence[Component], loss: CausalLoss, batch: Batch, seed: int) -> Check:
    """Check that the gradient of one example agrees with the slope of its loss along a random direction."""
    name = "gradient check"
    dtype = next(model.parameters()).dtype
    if dtype.itemsize < 4:
        short = str(dtype).removeprefix("torch.")
        advice = (
            "Differences of a loss drown in its rounding; run once with --precision float32 to check the gradients."
        )
        return Check(name, "warn", f"not possible in {short}", advice)
    slope = measure_slope(model, _within_budget(components, seed), loss, batch, seed)
    miss, doubt = abs(slope.gradient - slope.difference) / slope.typical, slope.doubt / slope.typical
    if not miss + doubt < float("inf"):
        return Check(name, "warn", "could not be compared", "The loss is not finite: see finite gradients.")
    tolerance = _GOOD + 3 * doubt
    verdict: Verdict = "good" if miss <= tolerance else "warn" if miss <= tolerance + _BAD else "bad"
    value = f"{slope.gradient:.4g} against {slope.difference:.4g} by finite differences"
    scope = f"{slope.parameters:,} parameters in {slope.components} components"
    if verdict == "good" and doubt > _UNSURE:
        return Check(name, "warn", value, f"The loss is too rough along {scope} for a verdict.", miss)
    advice = {
        "good": f"The gradient is the slope of the loss, over {scope}: {miss:.1%} of a typical slope apart "
        f"(up to {tolerance:.1%} is rounding and curvature).",
        "warn": f"They are {miss:.1%} of a typical slope apart over {scope}; check again with --precision float64.",
        "bad": f"The gradient is not the slope of the loss ({miss:.0%} of a typical slope apart): some weight is used "
        "outside the layer that owns it, or the forward pass is random. Leave it out with --components '!NAME'.",
    }[verdict]
    if slope.silent and verdict != "good":
        advice += f" No gradient arrived at {', '.join(slope.silent[:3])}."
    return Check(name, verdict, value, advice, miss)


def measure_slope(
    model: nn.Module, components: Sequence[Component], loss: CausalLoss, batch: Batch, seed: int
) -> Slope:
    """Measure the slope of one example's loss along a random direction, by its gradient and by finite differences.

    Each component moves by noise of the size of its own weights. The weights are as before when this returns.
    """
    generator = torch.Generator().manual_seed(seed)
    directions = [_direction(model, component, generator) for component in components]
    sizes = torch.tensor([float(one.double().square().mean()) for one in directions], dtype=torch.float64)
    dots, norms = DotSink([one[None] for one in directions]), NormSink(components)
    dots.begin(1)
    norms.begin(1)
    with GradientPass(model, components, loss) as gradient_pass:
        gradient_pass.run(batch, BothSinks(dots, norms))
    squared = norms.finish()[:, 0].double().cpu()
    found = _differences(model, components, directions, loss, batch)
    apart = [abs(longer - shorter) for longer, shorter in pairwise(found)]
    doubt, best = min((max(pair), number + 1) for number, pair in enumerate(pairwise(apart)))
    return Slope(
        float(dots.scores.double().sum()),
        found[best],
        doubt,
        max(float((squared * sizes).sum().sqrt()), 1e-30),
        len(components),
        sum(component.size for component in components),
        tuple(part.name for part, size in zip(components, squared, strict=True) if size == 0),
    )


def _within_budget(components: Sequence[Component], seed: int) -> list[Component]:
    """Return all components, or a random choice of them when they are too large to be copied; always at least one."""
    order = torch.randperm(len(components), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen, total = set(), 0
    for number in order:
        if not chosen or total + components[number].size <= MOST_PARAMETERS:
            chosen.add(number)
            total += components[number].size
    return [component for number, component in enumerate(components) if number in chosen]


def _direction(model: nn.Module, component: Component, generator: torch.Generator) -> Tensor:
    """Return noise `[out, in]` of the size of the component's weights; none in the untrained row `padding_idx`."""
    parameter = parameter_view(model, component)
    size = float(parameter.float().square().mean().sqrt()) or 0.02
    noise = size * torch.randn(component.shape, generator=generator)
    for use in component.uses:
        padding = getattr(model.get_submodule(use.module), "padding_idx", None)
        if padding is not None:
            noise[padding] = 0
    return noise.to(parameter.device, parameter.dtype)


def _differences(
    model: nn.Module, components: Sequence[Component], directions: Sequence[Tensor], loss: CausalLoss, batch: Batch
) -> list[float]:
    """Return central differences at every step."""
    loss.head_module(model)  # looked for at the weights as they are, not at moved ones
    found = []
    with torch.no_grad(), _moved_back(model, components) as originals:

        def loss_at(step: float) -> float:
            for component, original, direction in zip(components, originals, directions, strict=True):
                parameter_view(model, component).copy_(original + step * direction)
            return float(loss.losses(model, batch)[0])

        for step in STEPS[next(model.parameters()).dtype]:
            found.append((loss_at(step) - loss_at(-step)) / (2 * step))
    return found


@contextmanager
def _moved_back(model: nn.Module, components: Sequence[Component]) -> Iterator[list[Tensor]]:
    """Yield copies of the components' weights, which are restored bit by bit at the end, also after an error."""
    originals = [parameter_view(model, component).clone() for component in components]
    try:
        yield originals
    finally:
        with torch.no_grad():
            for component, original in zip(components, originals, strict=True):
                parameter_view(model, component).copy_(original)
