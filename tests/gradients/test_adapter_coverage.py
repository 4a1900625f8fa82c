"""PEFT adapters that compute a weight from others: LoRA on routers, trained rows of an embedding."""

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from tests.architectures import llama, mixtral, move_off_start, qwen_moe, sequences
from tests.gradients.test_exactness import engine_gradients
from vestige.models import parameter_view, select_components

LORA = {"r": 3, "lora_alpha": 5, "task_type": "CAUSAL_LM"}
ADAPTERS = {
    "router of Mixtral": (lambda: mixtral("eager"), {"target_modules": ["q_proj", "gate"]}),
    "router of Qwen": (qwen_moe, {"target_modules": ["q_proj"], "target_parameters": ["mlp.gate.weight"]}),
    "trained rows": (llama, {"target_modules": ["q_proj"], "trainable_token_indices": [1, 4, 7, 8]}),
    "trained rows, tied": (
        lambda: llama(tied=True),
        {"target_modules": ["q_proj"], "trainable_token_indices": [1, 4, 7, 8]},
    ),
}


def adapter(name: str) -> nn.Module:
    torch.manual_seed(0)
    make, settings = ADAPTERS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return move_off_start(get_peft_model(make(), LoraConfig(**LORA, **settings))).eval().double()


@pytest.mark.slow
@pytest.mark.parametrize("name", ADAPTERS)
def test_all_components_of_an_adapter_are_exact(name: str) -> None:
    model, data = adapter(name), sequences(5)
    components, rows, _ = engine_gradients(model, data, [[0, 1, 2], [3], [4]])
    assert any("lora_A" in component.name for component in components)
    assert ("trained rows" in name) == any("trainable_tokens_delta" in component.name for component in components)
    for row, gradients in enumerate(rows):
        model.requires_grad_(True).zero_grad()
        logits = model(input_ids=data.ids[row][None], use_cache=False).logits[0, :-1]
        losses = nn.functional.cross_entropy(logits, data.ids[row][1:], reduction="none")
        losses[data.targets[row][1:]].sum().backward()
        true = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
        scale = max(float(gradient.norm()) for gradient in true.values())
        for component, gradient in zip(components, gradients, strict=True):
            expected = torch.zeros_like(gradient)
            if component.parameter in true:
                expected = parameter_view(model, component, true[component.parameter])
            assert float((gradient - expected).norm()) <= 1e-9 * scale, component.name


def test_the_matrices_of_a_router_are_components_by_default() -> None:
    selection = select_components(adapter("router of Mixtral"))
    assert sum("gate.lora_" in component.name for component in selection.components) == 4
