"""Factors give exactly the per-example gradients of `torch.func`, on every architecture of the table."""

import pytest
import torch
from torch import Tensor, nn

from tests.architectures import CAUSAL, EXACT, Sequences, build, sequences
from tests.reference.gradients import example_gradients
from vestige.gradients import CausalLoss, GradientPass, GradientSink
from vestige.models import Component, select_components


def engine_gradients(
    model: nn.Module, data: Sequences, batches: list[list[int]], reduction: str = "sum", extra_padding: int = 0
) -> tuple[tuple[Component, ...], list[list[Tensor]], Tensor]:
    components = select_components(model, ("all",)).components
    dtype = next(model.parameters()).dtype
    rows: list[list[Tensor]] = [[] for _ in data.ids]
    losses = torch.zeros(len(data.ids), dtype=dtype)
    with GradientPass(model, components, CausalLoss(reduction)) as gradient_pass:
        for batch in batches:
            sink = GradientSink(components)
            sink.begin(len(batch), "cpu", dtype)
            losses[batch] = gradient_pass.run(data.batch(batch, extra_padding), sink)
            for place, row in enumerate(batch):
                rows[row] = [gradient[place] for gradient in sink.gradients]
    return components, rows, losses


def canonical(component: Component, gradients: dict[str, Tensor]) -> Tensor:
    name, _, number = component.name.partition("[")
    gradient = gradients[name]
    if number:
        gradient = gradient[int(number[:-1])]
    turned = component.uses[0].kind == "conv1d" or (number and gradient.shape != component.shape)
    return (gradient.T if turned and gradient.ndim == 2 else gradient).reshape(component.shape)


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [(name, torch.float64, 1e-10) for name in EXACT] + [(name, torch.float32, 1e-5) for name in CAUSAL],
)
def test_gradients_equal_torch_func(name: str, reduction: str, dtype: torch.dtype, tolerance: float) -> None:
    model, data = build(name, dtype), sequences()
    components, rows, _ = engine_gradients(model, data, [[0, 1, 2], [3, 4, 5], [6]], reduction)
    reference_model = build(name)
    for row, gradients in enumerate(rows):
        expected = example_gradients(reference_model, data.ids[row], data.targets[row], reduction == "mean")
        assert {component.name.partition("[")[0] for component in components} == {
            name for name in expected if not name.endswith("sinks")
        }
        scale = max(float(value.norm()) for value in expected.values())
        for component, gradient in zip(components, gradients, strict=True):
            error = float((gradient.double() - canonical(component, expected)).norm())
            assert error <= tolerance * scale, component.name
