import pytest
import torch

from tests.architectures import EXACT, build, sequences
from vestige.checks import check_slope, measure_slope
from vestige.gradients import CausalLoss
from vestige.models import select_components


@pytest.mark.slow
@pytest.mark.parametrize("architecture", EXACT)
def test_the_slope_in_double_precision_is_the_gradient(architecture):
    model = build(architecture)
    selection = select_components(model, ("all",))
    slope = measure_slope(model, selection.components, CausalLoss("mean"), sequences().batch([2]), seed=3)
    # transformers' RMSNorm rounds to float32 inside a float64 model: 1e-7 of the loss over a step of 1e-4.
    assert abs(slope.gradient - slope.difference) < 1e-3 * slope.typical
    assert slope.doubt < 2e-3 * slope.typical
    assert slope.parameters == selection.selected_parameters


@pytest.mark.slow
def test_the_weights_are_as_before_bit_by_bit(examined):
    model = build("gpt2", torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    examined(model, components="all")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_weights_come_back_when_the_model_breaks_off():
    model = build("llama", torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loss, batch = CausalLoss(), sequences().batch([1])
    loss.head_module(model)
    runs = 0

    def break_off(*_):
        nonlocal runs
        runs += 1
        if runs == 4:
            raise RuntimeError("broken")

    model.get_submodule("model.layers.1").register_forward_hook(break_off)
    with pytest.raises(RuntimeError, match="broken"):
        measure_slope(model, select_components(model).components, loss, batch, seed=0)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.slow
def test_a_weight_that_is_also_used_outside_its_layer_is_counted(examined):
    model = build("llama", torch.float32)
    projection = model.get_submodule("model.layers.0.mlp.down_proj")

    def use_it_again(module, inputs, output):
        return output + torch.nn.functional.linear(inputs[0], projection.weight).tanh()

    model.get_submodule("model.layers.0.mlp.down_proj").register_forward_hook(use_it_again)
    report = examined(model, components="model.layers.0.mlp.down_proj.weight")
    assert report["gradient check"].verdict == "good"
    assert report["autograd"].verdict == "good"


@pytest.mark.slow
def test_a_random_forward_pass_is_not_called_good(examined):
    model = build("llama", torch.float32)
    model.get_submodule("model.layers.0.mlp").register_forward_hook(
        lambda module, inputs, output: torch.nn.functional.dropout(output, 0.5)
    )
    report = examined(model)
    assert report["gradient check"].verdict != "good" or "too rough" in report["gradient check"].advice
    assert not report.ok


@pytest.mark.slow
def test_half_precision_says_how_to_check(examined):
    report = examined(build("llama", torch.bfloat16))
    assert report["gradient check"].verdict == "warn"
    assert "--precision float32" in report["gradient check"].advice
    assert report["precision"].verdict == "warn"


def test_a_large_model_is_checked_on_some_components():
    model = build("llama", torch.float32)
    components = select_components(model).components
    check = check_slope(model, components, CausalLoss(), sequences().batch([1]), seed=0, most_parameters=1000)
    assert check.verdict == "good"
    assert " parameters in " in check.advice
    assert f" parameters in {len(components)} components" not in check.advice
