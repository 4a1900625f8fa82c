import pytest
import torch

from tests.architectures import build
from vestige.gradients import _rules


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["gpt2", "llama-tied", "llama-lora", "mixtral-eager"])
def test_every_component_agrees_on_a_sound_model(examined, architecture):
    check = examined(build(architecture, torch.float32), components="all")["autograd"]
    assert check.verdict == "good", check
    assert check.number < 1e-4


def test_a_use_without_a_rule_ends_with_its_name_and_a_table(examined):
    model = build("llama", torch.float32)
    projection = model.get_submodule("model.layers.0.mlp.down_proj")
    projection.register_forward_hook(
        lambda module, inputs, output: output + torch.einsum("etc,oc->eto", inputs[0], projection.weight)
    )
    report = examined(model)
    assert report["gradients"].verdict == "bad"
    assert "The model uses model.layers.0.mlp.down_proj.weight" in report["gradients"].advice
    assert report["coverage"].verdict == "good"


@pytest.mark.slow
def test_a_small_layer_cannot_hide_behind_the_others(examined, monkeypatch):
    """All biases are 5 % off: of the whole gradient that is little."""
    right = _rules.deliver_vector
    monkeypatch.setattr(_rules, "deliver_vector", lambda receive, number, one: right(receive, number, 1.05 * one))
    check = examined(build("gpt2", torch.float32), components="all")["autograd"]
    assert check.verdict == "bad"
    assert "bias" in check.advice


@pytest.mark.slow
def test_a_model_that_mixes_long_batches_is_found_with_its_longest_example(examined):
    """Short examples are sound, as the other checks try them; the longest is not, once another shares its batch."""
    model = build("llama", torch.float32)

    def mix(module, inputs, output):
        return output + output.mean(0) if output.shape[1] > 15 else output

    model.get_submodule("model.layers.0.mlp").register_forward_hook(mix)
    check = examined(model)["autograd"]
    assert check.verdict == "bad"
    assert "of the longest example, in a batch" in check.advice or "of the shortest example, in a batch" in check.advice


@pytest.mark.slow
def test_zero_against_zero_is_no_agreement(examined):
    model = build("llama", torch.float32)
    model.get_submodule("model.layers.0.mlp").register_forward_hook(lambda module, inputs, output: 0 * output)
    some = examined(model, components="model.layers.*.mlp.*")["autograd"]
    assert some.verdict == "good"
    assert "3 of 6 components agree; 3 zero on both sides" in some.value
    assert "model.layers.0.mlp" in some.value
    none = examined(model, components="model.layers.0.mlp.*")["autograd"]
    assert none.verdict == "bad"
    assert "zero on both sides" in none.value
