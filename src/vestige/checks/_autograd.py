"""Gradients against plain autograd, component by component, on the shortest and the longest example."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from vestige.checks._probes import cut_examples
from vestige.checks._types import Check
from vestige.data import Batch, TokenizedData, make_batch, plan_batches
from vestige.gradients import CausalLoss, GradientPass, GradientSink, Reduction, token_losses
from vestige.models import Component, batch_sharing, parameter_view

GROUP = 50_000_000
"""Most parameters whose gradients are held at once, for two examples and twice."""
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}
"""Largest relative difference that rounding explains."""
SMALL = 1e-3
"""Gradients below this share of the example's largest are judged by it: they may be rounding alone."""


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
    """Check that every component's gradient is that of autograd; zero on both sides is no agreement."""
    name, dtype = "autograd", next(model.parameters()).dtype
    found = [one for group in _groups(components) for one in _compare(model, group, loss, ends_of(data, context))]
    unused = [one.component for one in found if one.ours == one.autograd == 0]
    if len(unused) == len(found):
        advice = "No selected component has a gradient on the examples tried: choose other --components, or see why."
        return Check(name, "bad", "zero on both sides everywhere", advice)
    wrong = sorted((one for one in found if not one.relative <= TOLERANCE[dtype]), key=lambda one: -one.relative)
    idle = f"; {len(unused)} zero on both sides (not used by these examples), such as {unused[0]}" if unused else ""
    worst = max(one.relative for one in found)
    agreeing = f"{len(found) - len(wrong) - len(unused)} of {len(found)} components agree{idle}"
    if not wrong:
        advice = (
            "The gradients of the shortest and the longest example, alone and batched as Vestige does, are those of "
            f"plain autograd: {worst:.0e} apart at most (up to {TOLERANCE[dtype]:.0e} is rounding)."
        )
        return Check(name, "good", agreeing, advice, worst)
    named = "; ".join(f"{one.component} {one.where}: {one.ours:.3g} for {one.autograd:.3g}" for one in wrong[:3])
    advice = (
        f"Gradients are wrong (norms: {named}). A weight is used in a way that no rule covers, or examples of a batch "
        f"are mixed. Leave it out with --components '!{wrong[0].component}', or try --token-budget 1."
    )
    return Check(name, "bad", agreeing, advice, worst)


def ends_of(data: TokenizedData, context: int | None) -> TokenizedData:
    """Return the shortest and the longest example that have a target, whole up to the model's context."""
    rows = np.flatnonzero(data.target_counts > 0)
    rows = rows[np.argsort(data.lengths[rows], kind="stable")]
    ends = data.subset(np.unique([rows[0], rows[-1]]))
    return ends if context is None else cut_examples(ends, context)


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
    names = ["of the shortest example", "of the longest example"][-count:]
    tries = [([row], f"{names[row]}, alone") for row in range(count)]
    together = plan_batches(data.lengths, int(count * data.lengths.max()), sharing=batch_sharing(model))
    tries += [(sorted(map(int, rows)), "in a batch") for rows in together if len(rows) > 1]
    worst: dict[str, Difference] = {}
    for rows, where in tries:
        ours = _by_factors(model, components, make_batch(data, rows).to(device), loss)
        for place, row in enumerate(rows):
            for number, component in enumerate(components):
                place_name = where if len(rows) == 1 else f"{names[row]}, {where}"
                one = _difference(
                    component.name, ours[number][place], true[row][number], _largest(true[row]), place_name
                )
                if one.relative >= worst.get(component.name, one).relative:
                    worst[component.name] = one
    return list(worst.values())


def _difference(name: str, ours: Tensor, true: Tensor, largest: float, where: str) -> Difference:
    size = float(true.norm())
    apart = float((ours.to(true) - true).norm())
    return Difference(name, apart / max(size, SMALL * largest, 1e-30), float(ours.norm()), size, where)


def _largest(gradients: Sequence[Tensor]) -> float:
    return max(float(one.norm()) for one in gradients)


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
