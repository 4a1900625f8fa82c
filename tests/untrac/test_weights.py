import pytest
import torch
from torch import nn

from tests.untrac.conftest import a_job, loaded_model
from vestige.errors import ModelError, VestigeError
from vestige.methods import borrow_weights, run_ascents
from vestige.models import model_fingerprint


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_bit_identical_after_an_error_or_ctrl_c(architecture, dtype, error):
    loaded = loaded_model(architecture, dtype)

    def interrupted():
        with borrow_weights(loaded) as weights, torch.no_grad():
            for parameter in weights.parameters.values():
                parameter.mul_(1.3).add_(0.1)
            raise error

    with pytest.raises(error):
        interrupted()
    assert model_fingerprint(loaded.model) == loaded.fingerprint
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert all(parameter.grad is None for parameter in loaded.model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("given", [{}, {"lora_rank": 2}, {"gradient_checkpointing": True}, {"direction": "untrac"}])
def test_weights_are_bit_identical_after_a_run(tmp_path, given):
    job = a_job(tmp_path, dtype=torch.float32, **given)
    run_ascents("Unlearning", job, job.recipe(1e-2))
    assert model_fingerprint(job.loaded.model) == job.loaded.fingerprint


def test_weights_that_do_not_come_back_are_an_error():
    loaded = loaded_model()
    with pytest.raises(VestigeError, match="not bit for bit"), borrow_weights(loaded) as weights:
        weights.start = {name: value + 1 for name, value in weights.start.items()}


def test_the_mirror_is_as_far_on_the_other_side():
    loaded = loaded_model()
    with borrow_weights(loaded) as weights:
        parameter = next(iter(weights.parameters.values()))
        start = parameter.detach().clone()
        with torch.no_grad():
            parameter.add_(0.25)
        there = parameter.detach().clone()
        with weights.at(weights.mirror()):
            assert torch.allclose(parameter, start - 0.25)
        assert torch.equal(parameter, there)


class Quantised(nn.Linear):
    """A linear layer whose weight is whole numbers, as in a 4-bit or 8-bit base."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False)
        self.scale = float(plain.weight.abs().max()) / 127
        codes = (plain.weight / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)  # pyright: ignore

    def forward(self, input):
        return nn.functional.linear(input, self.weight.to(input.dtype) * self.scale)


def quantised_model():
    loaded = loaded_model("llama", torch.float32)
    for module in list(loaded.model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and name != "lm_head":
                setattr(module, name, Quantised(child))
    return loaded


def test_trap_nf4_a_quantised_base_is_refused_because_only_the_rest_would_move():
    with pytest.raises(ModelError, match="--lora-rank"), borrow_weights(quantised_model()):
        pass


def test_lora_moves_beside_a_quantised_base_and_is_gone_afterwards():
    loaded = quantised_model()
    before = model_fingerprint(loaded.model)
    names = {name for name, _ in loaded.model.named_modules()}
    with borrow_weights(loaded, lora_rank=2) as weights:
        assert all(".lora_" in name for name in weights.parameters)
        assert weights.count < 5000
    assert model_fingerprint(loaded.model) == before
    assert {name for name, _ in loaded.model.named_modules()} == names
