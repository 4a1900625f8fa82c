"""Gradients against plain autograd, against finite differences, and under other batches and paddings."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from vestige.checks._inputs import EXTRA_PADDING, cut_examples, pad_examples, rows_by_length
from vestige.checks._report import Check, Verdict
from vestige.data import Batch, Sharing, TokenizedData, make_batch, plan_batches
from vestige.gradients import (
    BothSinks,
    CausalLoss,
    DotSink,
    GradientPass,
    GradientSink,
    NormSink,
    Reduction,
    token_losses,
)
from vestige.indexes import CompressedGradients, IndexedComponent, ShardContent
from vestige.models import Component, batch_sharing, parameter_view

GROUP = 50_000_000
"""Most parameters whose gradients are held at once, for two examples and twice."""
MOST_PARAMETERS = 150_000_000
"""A direction and a copy of the moved weights are held in memory: larger models are checked on some components."""
SMALL = 1e-3
"""Gradients below this share of the example's largest are judged by it: they may be rounding alone."""
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}
"""Largest relative difference to autograd that rounding explains."""
ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""The same between two batches: kernels sum in another order for another shape, and the error grows with depth. Half
precision has 2 to 3 digits to begin with."""
STEPS = {
    torch.float32: (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4),
    torch.float64: (1e-2, 1e-3, 1e-4, 1e-5, 1e-6),
}
"""Steps of finite differences, relative to the weights. Too long a step leaves the tangent (at a ReLU's kink soon), too
short a one drowns in rounding."""
_WARN = 10
_GOOD, _BAD, _UNSURE = 0.01, 0.1, 0.05
"""Shares of a typical slope. In float32 a loss of 100 nats is known to 1e-5, so a difference over a step of 1e-3 is
known to 1e-2; what neighbouring steps disagree by is tolerated three times on top."""


class Difference(NamedTuple):
    """How far the gradient of one component is from autograd's, where that is worst."""

    component: str
    relative: float
    ours: float
    """Norm of the gradient as Vestige computes it."""
    autograd: float
    where: str


def check_autograd(
    model: nn.Module, components: Sequence[Component], loss: CausalLoss, data: TokenizedData, context: int | None
) -> Check:
    """Check that every component's gradient is that of autograd; zero on both sides is no agreement.

    Tried are the shortest and the longest example that have a target, whole up to the model's context.
    """
    name, tolerance = "autograd", TOLERANCE[next(model.parameters()).dtype]
    ends = data.subset(np.unique(rows_by_length(data)[[0, -1]]))
    ends = ends if context is None else cut_examples(ends, context)
    found = [one for group in _groups(components) for one in _compare(model, group, loss, ends)]
    unused = [one.component for one in found if one.ours == one.autograd == 0]
    if len(unused) == len(found):
        advice = "No selected component has a gradient on the examples tried: choose other --components, or see why."
        return Check(name, "bad", "zero on both sides everywhere", advice)
    wrong = sorted((one for one in found if not one.relative <= tolerance), key=lambda one: -one.relative)
    idle = f"; {len(unused)} zero on both sides (not used by these examples), such as {unused[0]}" if unused else ""
    worst = max(one.relative for one in found)
    agreeing = f"{len(found) - len(wrong) - len(unused)} of {len(found)} components agree{idle}"
    if not wrong:
        advice = (
            "The gradients of the shortest and the longest example, alone and batched as Vestige does, are those of "
            f"plain autograd: {worst:.0e} apart at most (up to {tolerance:.0e} is rounding)."
        )
        return Check(name, "good", agreeing, advice, worst)
    named = "; ".join(f"{one.component} {one.where}: {one.ours:.3g} for {one.autograd:.3g}" for one in wrong[:3])
    advice = (
        f"Gradients are wrong (norms: {named}). A weight is used in a way that no rule covers, or examples of a batch "
        f"are mixed. Leave it out with --components '!{wrong[0].component}', or try --token-budget 1."
    )
    return Check(name, "bad", agreeing, advice, worst)


def _groups(components: Sequence[Component]) -> Iterator[list[Component]]:
    """Yield components in groups that fit into memory."""
    group: list[Component] = []
    for component in components:
        if group and sum(one.size for one in group) + component.size > GROUP:
            yield group
            group = []
        group.append(component)
    yield group


def _compare(
    model: nn.Module, components: Sequence[Component], loss: CausalLoss, data: TokenizedData
) -> list[Difference]:
    """Return the worst of all examples and batchings, per component."""
    device, count = next(model.parameters()).device, len(data)
    true = [_by_autograd(model, components, make_batch(data, [row]).to(device), loss.reduction) for row in range(count)]
    largest = [max(float(gradient.norm()) for gradient in row) for row in true]
    names = ["of the shortest example", "of the longest example"][-count:]
    plan = plan_batches(data.lengths, int(count * data.lengths.max()), sharing=batch_sharing(model))
    shared = [sorted(map(int, rows)) for rows in plan if len(rows) > 1]
    worst: dict[str, Difference] = {}
    for rows in [*([row] for row in range(count)), *shared]:
        ours = _by_factors(model, components, make_batch(data, rows).to(device), loss)
        for position, row in enumerate(rows):
            where = f"{names[row]}, {'alone' if len(rows) == 1 else 'in a batch'}"
            for component, computed, expected in zip(components, ours, true[row], strict=True):
                gradient, size = computed[position], float(expected.norm())
                apart = float((gradient.to(expected) - expected).norm()) / max(size, SMALL * largest[row], 1e-30)
                one = Difference(component.name, apart, float(gradient.norm()), size, where)
                if apart >= worst.get(component.name, one).relative:
                    worst[component.name] = one
    return list(worst.values())


def _by_factors(model: nn.Module, components: Sequence[Component], batch: Batch, loss: CausalLoss) -> list[Tensor]:
    sink = GradientSink(components)
    dtype = torch.promote_types(next(model.parameters()).dtype, torch.float32)
    sink.begin(len(batch.rows), next(model.parameters()).device, dtype)
    with GradientPass(model, components, loss) as gradient_pass:
        gradient_pass.run(batch, sink)
    return sink.gradients


def _by_autograd(model: nn.Module, components: Sequence[Component], batch: Batch, reduction: Reduction) -> list[Tensor]:
    """Return the gradients `[out, in]` of a lone example's loss, by the model's own forward pass."""
    names = dict.fromkeys(component.parameter for component in components)
    parameters = [model.get_parameter(name) for name in names]
    with _requiring_gradients(model, parameters), torch.enable_grad():
        losses = token_losses(model, batch)
        total = losses.sum() if reduction == "sum" else losses.sum() / max(1, int((batch.labels[:, 1:] >= 0).sum()))
        if total.requires_grad:
            found = torch.autograd.grad(total, parameters, allow_unused=True)
        else:
            found = [None] * len(parameters)
    by_name = dict(zip(names, found, strict=True))
    return [
        torch.zeros(component.shape, dtype=parameters[0].dtype, device=batch.labels.device)
        if (gradient := by_name[component.parameter]) is None
        else parameter_view(model, component, gradient.contiguous())
        for component in components
    ]


@contextmanager
def _requiring_gradients(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let these parameters alone require gradients, and restore the flags afterwards."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def try_batches(
    compute: CompressedGradients,
    probes: TokenizedData,
    ends: TokenizedData,
    sharing: Sharing,
    context: int | None,
    columns: Sequence[IndexedComponent],
    dtype: torch.dtype,
) -> tuple[list[Check], ShardContent]:
    """Check batch and padding, and return the probes' gradients computed one by one without padding.

    `ends` are the longest and the shortest example that can share a batch, or none.
    """
    width = int(probes.lengths.max()) + EXTRA_PADDING
    alone, together, bare = _compute_rows(compute, probes, width if context is None else min(width, context), sharing)
    pairs = [(alone, together, bare)]
    if len(ends):
        pairs.append(_compute_rows(compute, ends, int(ends.lengths.max()), sharing))
    batch = [
        _check_same("batch invariance", "the other examples of its batch", before, after, columns, dtype)
        for before, after, _ in pairs
    ]
    padding = [_check_same("padding", "padding tokens", before, after, columns, dtype) for after, _, before in pairs]
    return [max(checks, key=_badness) for checks in (batch, padding)], bare


def _badness(check: Check) -> tuple[int, float]:
    return ("good", "warn", "bad").index(check.verdict), check.number or 0.0


def _compute_rows(
    compute: CompressedGradients, probes: TokenizedData, width: int, sharing: Sharing
) -> tuple[ShardContent, ShardContent, ShardContent]:
    """Compute gradients padded to `width` and alone, the same in batches as far as the model allows, and unpadded."""
    most = sharing.most(probes.lengths)
    wide = pad_examples(probes, np.where(most < 0, width, np.minimum(most, width)))
    singly = [np.array([row]) for row in range(len(probes))]
    together = compute.rows(wide, [np.sort(rows) for rows in plan_batches(wide.lengths, 2**62, sharing=sharing)])
    order = together.example.argsort()
    together = ShardContent(*(part[order] for part in together))
    return compute.rows(wide, singly), together, compute.rows(probes, singly)


def _check_same(
    name: str,
    cause: str,
    before: ShardContent,
    after: ShardContent,
    columns: Sequence[IndexedComponent],
    dtype: torch.dtype,
) -> Check:
    """Check that no example's gradient has moved by more than rounding explains."""
    precision, tolerance = str(dtype).removeprefix("torch."), ROUNDING[dtype]
    moved = (after.gradients - before.gradients).double()
    # An example whose gradient is zero on both sides has not moved.
    relative = moved.norm(dim=1) / before.gradients.double().norm(dim=1).clamp(min=1e-30)
    worst = float(relative.max())
    if not np.isfinite(worst):
        return Check(name, "warn", "could not be compared", "The gradients are not finite: see finite gradients.")
    verdict: Verdict = "good" if worst <= tolerance else "warn" if worst <= _WARN * tolerance else "bad"
    value = f"{worst:.1e} relative difference (up to {tolerance:.0e} is {precision} rounding)"
    if verdict == "good":
        return Check(name, verdict, value, f"A gradient does not depend on {cause}.", worst)
    row = int(relative.argmax())
    # Columns that components share show only that some component moved.
    apart = len({part.start for part in columns}) == len(columns)
    furthest = max(columns, key=lambda part: float(moved[row, part.start : part.stop].norm())).name
    where = f"most in {furthest}" if apart else "in some component"
    if verdict == "warn":
        advice = f"More than usual, {where}; compare with --precision float32."
    else:
        advice = (
            f"A gradient depends on {cause}, {where}: its scores would too. Look for layers that mix "
            "examples (batch norm, a mean over the batch, mixture-of-experts capacity) or read padding; "
            "--token-budget 1 runs every example alone."
        )
    return Check(name, verdict, value, advice, worst)


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


def check_slope(
    model: nn.Module,
    components: Sequence[Component],
    loss: CausalLoss,
    batch: Batch,
    seed: int,
    most_parameters: int = MOST_PARAMETERS,
) -> Check:
    """Check that the gradient of one example agrees with the slope of its loss along a random direction."""
    name = "gradient check"
    dtype = next(model.parameters()).dtype
    if dtype.itemsize < 4:
        short = str(dtype).removeprefix("torch.")
        advice = (
            "Differences of a loss drown in its rounding; run once with --precision float32 to check the gradients."
        )
        return Check(name, "warn", f"not possible in {short}", advice)
    slope = measure_slope(model, _choose_components(components, seed, most_parameters), loss, batch, seed)
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


def _choose_components(components: Sequence[Component], seed: int, most: int) -> list[Component]:
    """Choose all components, or at random at least one of them, with at most `most` parameters."""
    order = torch.randperm(len(components), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen, total = set(), 0
    for number in order:
        if not chosen or total + components[number].size <= most:
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
    """Return central differences at every step; the weights are restored bit by bit, also after an error."""
    loss.head_module(model)  # looked for at the weights as they are, not at moved ones
    originals = [parameter_view(model, component).clone() for component in components]

    def move(step: float) -> None:
        for component, original, direction in zip(components, originals, directions, strict=True):
            parameter_view(model, component).copy_(original + step * direction if step else original)

    found = []
    with torch.no_grad():
        try:
            for step in STEPS[next(model.parameters()).dtype]:
                move(step)
                ahead = float(loss.losses(model, batch)[0])
                move(-step)
                found.append((ahead - float(loss.losses(model, batch)[0])) / (2 * step))
        finally:
            move(0)
    return found
