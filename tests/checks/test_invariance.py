import pytest
import torch

from tests.architectures import EXACT, build


@pytest.mark.slow
@pytest.mark.parametrize("architecture", EXACT)
def test_models_whose_gradients_are_right_are_good(architecture, examined):
    report = examined(build(architecture, torch.float32), components="all")
    for name in ("batch invariance", "padding", "gradient check", "finite gradients"):
        assert report[name].verdict == "good", report[name]
    assert report.ok


def add_to_first_layer(model: torch.nn.Module, change) -> torch.nn.Module:
    layer = model.get_submodule("model.layers.0.mlp")
    layer.register_forward_hook(lambda module, inputs, output: output + change(output))
    return model


@pytest.mark.slow
def test_a_model_that_adds_the_mean_of_the_batch_is_found(examined):
    model = add_to_first_layer(build("llama", torch.float32), lambda output: output.mean(0, keepdim=True))
    report = examined(model)
    found = report["batch invariance"]
    assert found.verdict == "bad"
    assert found.number > 0.01
    assert "model.layers." in found.advice
    assert report["padding"].verdict == "good"
    assert not report.ok


@pytest.mark.slow
def test_it_is_found_with_one_example_too(examined, rows):
    model = add_to_first_layer(build("llama", torch.float32), lambda output: output.mean(0, keepdim=True))
    assert examined(model, data=rows[3:4])["batch invariance"].verdict == "bad"


@pytest.mark.slow
def test_a_model_that_reads_its_padding_is_found(examined):
    model = add_to_first_layer(build("llama", torch.float32), lambda output: output.mean(1, keepdim=True))
    report = examined(model)
    assert report["padding"].verdict == "bad"
    assert report["batch invariance"].verdict == "good"


@pytest.mark.slow
def test_a_slight_dependence_is_a_warning(examined):
    model = add_to_first_layer(build("llama", torch.float32), lambda output: 1e-3 * output.mean(0, keepdim=True))
    assert examined(model)["batch invariance"].verdict == "warn"


@pytest.mark.slow
def test_what_is_rounding_depends_on_the_precision(examined):
    def slightly(output):
        return 1e-4 * output.mean(0, keepdim=True)

    assert examined(add_to_first_layer(build("llama", torch.float64), slightly))["batch invariance"].verdict == "bad"
    report = examined(add_to_first_layer(build("llama", torch.bfloat16), slightly))
    assert report["batch invariance"].verdict == "good"
    assert "bfloat16 rounding" in report["batch invariance"].value


@pytest.mark.slow
def test_weights_that_are_not_numbers_are_found_and_the_examples_named(examined):
    model = build("llama", torch.float32)
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight")[0, 0] = torch.nan
    report = examined(model)
    assert report["finite gradients"].verdict == "bad"
    assert "'row-" in report["finite gradients"].advice
    assert "precision" in report["finite gradients"].advice
    for name in ("batch invariance", "padding", "gradient check"):
        assert report[name].verdict == "warn"
        assert report[name].value == "could not be compared"


@pytest.mark.slow
def test_every_compression_is_tried_as_it_would_be_indexed(examined):
    for compress in ("none", "mask:4x4 | sjlt:8", "tensorsketch:16", "gauss:8"):
        assert examined(build("gpt2", torch.float32), compress=compress)["batch invariance"].verdict == "good"
