import pytest

from vestige.reports import find_place, make_grid


@pytest.mark.parametrize(
    ("component", "place"),
    [
        ("model.layers.3.self_attn.q_proj.weight", (3, "self_attn.q_proj")),
        ("transformer.h.3.attn.c_attn.weight", (3, "attn.c_attn")),
        ("transformer.h.11.attn.c_attn.bias", (11, "attn.c_attn")),
        ("gpt_neox.layers.3.attention.dense.weight", (3, "attention.dense")),
        ("model.decoder.layers.3.fc1.weight", (3, "fc1")),
        ("base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight", (0, "mlp.up_proj")),
        ("base_model.model.model.layers.0.mlp.up_proj.base_layer.weight", (0, "mlp.up_proj")),
        ("model.layers.3.mlp.experts.5.w1.weight", (3, "mlp.experts.5.w1")),
        ("transformer.wte.weight", (None, "wte")),
        ("lm_head.weight", (None, "lm_head")),
        ("weight", (None, "weight")),
    ],
)
def test_names_of_all_architectures_are_placed(component, place):
    assert find_place(component) == place


def test_the_factors_of_an_adapter_share_the_cell_of_their_module():
    names = [f"layers.{layer}.up_proj.lora_{factor}.weight" for layer in (0, 1) for factor in "AB"]
    grid = make_grid(names)
    assert grid.modules == ("up_proj",)
    assert grid.sums(dict(zip(names, (1.0, 2.0, 4.0, 8.0), strict=True))) == [3.0, 12.0]


def test_weight_and_bias_share_a_cell_and_the_cells_sum_to_the_score():
    scores = {"h.0.fc.weight": 1.0, "h.0.fc.bias": 0.25, "h.1.fc.weight": -0.5, "wte.weight": 2.0}
    grid = make_grid(scores)
    assert (grid.layers, grid.modules, grid.others) == ((0, 1), ("fc",), ("wte",))
    assert grid.sums(scores) == [1.25, -0.5, 2.0]
