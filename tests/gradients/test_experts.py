"""Mixtures of experts: routed tokens reach the right example, the right expert and the right parameter."""

import pytest
import torch
from torch import nn

from tests.architectures import build, mixtral, move_off_start, sequences
from tests.gradients.test_exactness import engine_gradients
from vestige.models import parameter_view, select_components


@pytest.mark.slow
@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm"])
def test_stacked_products_give_the_gradients_of_the_plain_loop(experts: str) -> None:
    """`grouped_mm`, the default of transformers, exists in float32 only."""
    torch.manual_seed(0)
    stacked = move_off_start(mixtral(experts)).eval()
    plain = mixtral("eager").eval()
    plain.load_state_dict(stacked.state_dict())
    data = sequences()
    _, rows, losses = engine_gradients(stacked, data, [list(range(7))])
    _, wanted, expected_losses = engine_gradients(plain, data, [[row] for row in range(7)])
    assert torch.allclose(losses, expected_losses, rtol=1e-5)
    for found, expected in zip(rows, wanted, strict=True):
        scale = max(float(gradient.norm()) for gradient in expected)
        assert all(
            float((gradient - other).norm()) <= 1e-5 * scale for gradient, other in zip(found, expected, strict=True)
        )


def test_the_forward_of_the_experts_is_put_back() -> None:
    model = build("mixtral")
    engine_gradients(model, sequences(2), [[0, 1]])
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_an_expert_is_a_component_of_its_own() -> None:
    model = build("gpt-oss")
    components = select_components(model, ("*.layers.1.mlp.experts.gate_up_proj",)).components
    assert [component.name.rpartition(".")[2] for component in components] == [f"gate_up_proj[{n}]" for n in range(4)]
    stack = model.get_parameter("model.layers.1.mlp.experts.gate_up_proj").detach()
    assert components[2].parameter == "model.layers.1.mlp.experts.gate_up_proj"
    assert torch.equal(parameter_view(model, components[2]), stack[2].T)
    parameter_view(model, components[2]).zero_()
    assert float(stack[2].abs().max()) == 0
    assert float(stack[1].abs().max()) > 0


def test_experts_that_are_modules_of_their_own_are_listed_as_without_rule() -> None:
    """They see rows gathered from the whole batch, which no longer say whose they are."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts, self.shared_experts = nn.ModuleList([nn.Linear(4, 4)]), nn.Linear(4, 4)

    rows = {row.name: row.reason for row in select_components(Block(), ("all",)).coverage}
    assert "gathered from the whole batch" in rows["experts.0.weight"]
    assert rows["shared_experts.weight"] == ""
