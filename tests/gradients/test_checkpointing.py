"""Gradient checkpointing runs a block's forward hooks twice: every factor still arrives once."""

import pytest
import torch
from torch import Tensor, nn

from tests.architectures import build, enable_checkpointing, sequences
from vestige.data import Batch
from vestige.gradients import CausalLoss, GradientPass, GradientSink
from vestige.models import select_components


def gradients_of(model: nn.Module, batch: Batch, patterns: tuple[str, ...]) -> list[Tensor]:
    components = select_components(model, patterns).components
    sink = GradientSink(components)
    sink.begin(len(batch.rows), "cpu", torch.float64)
    with GradientPass(model, components, CausalLoss()) as gradient_pass:
        gradient_pass.run(batch, sink)
    return sink.gradients


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "neox", "llama-lora", "mixtral"])
@pytest.mark.parametrize("pattern", ["all", "layers 1"])
def test_checkpointing_neither_repeats_nor_loses_a_factor(name: str, reentrant: bool, pattern: str) -> None:
    """With frozen weights and, under `layers 1`, an untouched first block that nothing would differentiate."""
    model, batch = build(name), sequences().batch(list(range(7)))
    expected = gradients_of(model, batch, (pattern,))
    model.train()
    enable_checkpointing(model, use_reentrant=reentrant)
    model.disable_input_require_grads()  # what transformers does for a Trainer; other models have no such help
    blocks = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    assert blocks, "nothing is checkpointed"
    for gradient, wanted in zip(gradients_of(model, batch, (pattern,)), expected, strict=True):
        assert float(wanted.norm()) > 0 or name == "mixtral"
        assert torch.allclose(gradient, wanted, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", ["llama", "llama-lora"])
def test_a_checkpointed_block_runs_twice_or_the_test_above_shows_nothing(name: str) -> None:
    model, batch = build(name), sequences().batch([0, 1])
    model.train()
    enable_checkpointing(model)
    calls: list[int] = []
    layer = next(module for path, module in model.named_modules() if path.endswith("layers.0.self_attn"))
    layer.register_forward_hook(lambda *_: calls.append(1))
    with GradientPass(model, select_components(model, ("all",)).components, CausalLoss()) as gradient_pass:
        calls.clear()
        sink = GradientSink(select_components(model, ("all",)).components)
        sink.begin(2, "cpu", torch.float64)
        gradient_pass.run(batch, sink)
    assert len(calls) == 2
