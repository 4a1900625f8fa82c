"""Adam's moments out of a Trainer's checkpoint: each at the parameter that it belongs to."""

import warnings

import pytest
import torch

from tests.architectures import EXACT, build, lora
from tests.reference.ensemble import adam_update
from tests.trainer import trained_run
from vestige.curvature import Moments, adam_direction, component_moments, read_adam
from vestige.errors import ModelError
from vestige.models import select_components


def trained(name: str, folder, **given):
    torch.manual_seed(0)
    model = EXACT[name]()
    for each, parameter in model.named_parameters():
        if given.pop(f"freeze {each}", False):
            parameter.requires_grad_(False)
    return trained_run(model, folder, **given)


def check(trainer, folder, model=None) -> None:
    """Every moment read equals the live optimizer's own for that very parameter."""
    model = trainer.model if model is None else model
    flags = [(each, each.requires_grad) for each in model.parameters()]
    model.requires_grad_(False)  # as a loaded model is
    found = read_adam(folder, model)
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
    state = trainer.optimizer.optimizer.state if hasattr(trainer.optimizer, "optimizer") else trainer.optimizer.state
    expected = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert set(found) == expected
    for name, parameter in trainer.model.named_parameters():
        if name in expected:
            assert torch.equal(found[name].first, state[parameter]["exp_avg"]), name
            assert torch.equal(found[name].second, state[parameter]["exp_avg_sq"]), name
            assert found[name].step == 6


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama-tied", "opt", "llama-lora"])
def test_every_moment_is_at_its_own_parameter(name, tmp_path):
    """Tied weights, transposed Conv1D, biases and norms in the group without decay, frozen bases under LoRA."""
    check(trained(name, tmp_path), tmp_path / "checkpoint-6")


def test_frozen_parameters_are_left_out_where_shapes_tell(tmp_path):
    frozen = {"freeze transformer.wpe.weight": True}
    check(trained("gpt2", tmp_path, **frozen), tmp_path / "checkpoint-6")


def test_frozen_parameters_that_shapes_do_not_tell_are_refused(tmp_path):
    trainer = trained("gpt2", tmp_path, **{"freeze transformer.h.0.ln_1.weight": True})
    with pytest.raises(ModelError, match="does not follow from their shapes"):
        read_adam(tmp_path / "checkpoint-6", trainer.model)


def test_a_conv1d_is_transposed_with_its_weights(tmp_path):
    trainer = trained("gpt2", tmp_path)
    (component,) = select_components(trainer.model, ("transformer.h.0.mlp.c_fc.weight",)).components
    found = read_adam(tmp_path / "checkpoint-6", trainer.model)
    moments = component_moments(trainer.model, component, found)
    assert moments.first.shape == component.shape == (64, 16)
    assert torch.equal(moments.first, found[component.name].first.T)


def test_the_direction_is_the_step_that_adam_takes():
    """One real step of torch's Adam from given moments, undone to what it subtracted."""
    model = torch.nn.Linear(3, 2, bias=False).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.0, eps=1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        before = model.weight.detach().clone()
        held = optimizer.state[model.weight]
        first = held["exp_avg"].clone() if held else torch.zeros(2, 3, dtype=torch.float64)
        second = held["exp_avg_sq"].clone() if held else torch.zeros(2, 3, dtype=torch.float64)
        step = int(held["step"]) if held else 0
        model.weight.grad = torch.randn(2, 3, generator=generator, dtype=torch.float64)
        optimizer.step()
        expected = adam_update(model.weight.grad, first, second, step, (0.9, 0.999), 1e-3)
        assert torch.allclose(before - model.weight.detach(), expected, rtol=1e-9)
        found = adam_direction(model.weight.grad[None], Moments(first, second, step, (0.9, 0.999), 1e-3))
        assert torch.allclose(found[0], expected, rtol=1e-12)


def test_mistakes_say_what_to_do(tmp_path):
    model = build("gpt2", torch.float32)
    with pytest.raises(ModelError, match="save_only_model"):
        read_adam(tmp_path, model)
    (tmp_path / "optimizer.pt").write_bytes(b"")
    with pytest.raises(ModelError, match="does not read"):
        read_adam(tmp_path, model)
    sgd = torch.optim.SGD(model.requires_grad_(True).parameters(), lr=0.1, momentum=0.9)
    sum(parameter.sum() for parameter in model.parameters()).backward()  # type: ignore[union-attr]
    sgd.step()
    torch.save(sgd.state_dict(), tmp_path / "optimizer.pt")
    with pytest.raises(ModelError, match=r"momentum_buffer.*--method tracin"):
        read_adam(tmp_path, model)
    adam = torch.optim.Adam(model.parameters())
    adam.step()
    torch.save(adam.state_dict(), tmp_path / "optimizer.pt")
    assert read_adam(tmp_path, model)["transformer.ln_f.bias"].step == 1
    with pytest.raises(ModelError, match="do not fit"):
        read_adam(tmp_path, build("llama", torch.float32))


def test_a_frozen_component_is_refused(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = lora()
        trainer = trained_run(model, tmp_path)
    found = read_adam(tmp_path / "checkpoint-6", trainer.model)
    (component,) = select_components(trainer.model, ("*layers.0.self_attn.k_proj.weight",)).components
    with pytest.raises(ModelError, match="was frozen"):
        component_moments(trainer.model, component, found)
