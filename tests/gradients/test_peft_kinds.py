"""Gradients of adapters against autograd through PEFT's own forward pass, one example at a time, in float64."""

import warnings

import pytest
import torch
from peft import LNTuningConfig, LoraConfig, get_peft_model
from torch import Tensor, nn

from tests.architectures import Sequences, build, move_off_start, sequences
from vestige.errors import ModelError
from vestige.gradients import CausalLoss, GradientPass, GradientSink, observe
from vestige.models import Component, select_components

INVOCATION = [11, 12]


def adapted(config, name: str = "llama") -> nn.Module:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(build(name), config, autocast_adapter_dtype=False)
    return move_off_start(model).double().eval()


def lora(**more) -> LoraConfig:
    return LoraConfig(
        **(
            {"task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj", "down_proj"]}
            | more
        )
    )


def invoked() -> Sequences:
    """Invocations at the start, in the middle, twice, at the very end, and none."""
    data = sequences(6)
    for row, places in enumerate([[0], [5], [1, 4], [-2], [], [3]]):
        for place in places:
            start = place % len(data.ids[row])
            data.ids[row][start : start + 2] = torch.tensor(INVOCATION)
    return data


def expected_of(model: nn.Module, ids: Tensor, targets: Tensor) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients by autograd through the model's own `forward`."""
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    log = torch.log_softmax(model(input_ids=ids[None], use_cache=False).logits[0], -1)
    loss = -sum(log[place - 1, ids[place]] for place in range(1, len(ids)) if targets[place])
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    return float(loss.detach()), {
        name: torch.zeros_like(parameter) if gradient is None else gradient
        for (name, parameter), gradient in zip(parameters.items(), found, strict=True)
    }


def computed(
    model: nn.Module, components: tuple[Component, ...], data: Sequences, size: int
) -> tuple[list[list[Tensor]], list[float]]:
    rows, losses = [], []
    with GradientPass(model, components, CausalLoss()) as gradient_pass:
        for start in range(0, len(data.ids), size):
            batch = list(range(start, min(start + size, len(data.ids))))
            sink = GradientSink(components)
            sink.begin(len(batch), "cpu", torch.float64)
            losses += gradient_pass.run(data.batch(batch, extra_padding=2), sink).tolist()
            rows += [[part[place] for part in sink.gradients] for place in range(len(batch))]
    return rows, losses


def require_exact(model: nn.Module, data: Sequences, size: int, patterns: tuple[str, ...] = ("default",)) -> None:
    components = select_components(model, patterns).components
    rows, losses = computed(model, components, data, size)
    for row, gradients in enumerate(rows):
        loss, expected = expected_of(model, data.ids[row], data.targets[row])
        assert losses[row] == pytest.approx(loss, rel=1e-10)
        scale = max(float(expected[part.name].norm()) for part in components)
        for part, gradient in zip(components, gradients, strict=True):
            error = float((gradient - expected[part.name].reshape(part.shape)).norm())
            assert error <= 1e-10 * scale, part.name


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_an_activated_lora_acts_from_its_invocation_on(size):
    model, data = adapted(lora(alora_invocation_tokens=INVOCATION)), invoked()
    plain = adapted(lora())
    losses = [expected_of(one, data.ids[1], data.targets[1])[0] for one in (model, plain)]
    assert losses[0] != pytest.approx(losses[1], rel=1e-3), "the invocation changes nothing: the test is blind"
    require_exact(model, data, size)
    require_exact(model, data, size, ("all",))


def test_an_activated_lora_is_as_before_after_the_pass():
    model, data = adapted(lora(alora_invocation_tokens=INVOCATION)), invoked()
    before = model(input_ids=data.ids[1][None]).logits
    computed(model, select_components(model).components, data, 3)
    assert torch.equal(model(input_ids=data.ids[1][None]).logits, before)
    kinds = {
        type(module.lora_variant["default"]).__name__ for module in model.modules() if hasattr(module, "lora_variant")
    }
    assert kinds == {"ALoraLinearVariant"}


def test_an_activated_lora_is_not_watched_while_it_trains():
    model = adapted(lora(alora_invocation_tokens=INVOCATION))
    with pytest.raises(ModelError, match="activated LoRA"):
        observe(model, select_components(model).components, lambda: pytest.fail("nothing runs"))


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7])
def test_dora_is_exact_at_every_batch_size_with_its_magnitudes(size):
    model = adapted(lora(use_dora=True))
    names = [part.name for part in select_components(model).components]
    assert sum("lora_magnitude_vector" in name for name in names) == len(names) / 3
    require_exact(model, sequences(), size)
    require_exact(model, sequences(), size, ("all",))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_dora_on_every_linear_layer(name):
    require_exact(
        adapted(lora(use_dora=True, target_modules="all-linear", fan_in_fan_out=name == "gpt2"), name), sequences(), 3
    )


@pytest.mark.parametrize("targets", [["input_layernorm", "norm"], ["post_attention_layernorm"]])
def test_tuned_norms_are_exact(targets):
    require_exact(adapted(LNTuningConfig(task_type="CAUSAL_LM", target_modules=targets)), sequences(), 3)


def test_modules_that_were_saved_whole_are_exact():
    model = adapted(lora(modules_to_save=["lm_head", "input_layernorm"]))
    require_exact(model, sequences(), 3, ("adapter",))
