import copy

import pytest
import torch

from tests.architectures import enable_checkpointing
from tests.online.workbench import same_bits, train, training_model, validation
from vestige.online import OnlineAttribution

MODELS = ["gpt2", "gpt2-untied", "llama", "llama-tied"]


def engine_with(count=4, **settings):
    return lambda model, optimizer: OnlineAttribution(model, validation(count), optimizer=optimizer, **settings)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("count", [1, 4])
def test_training_is_the_same_bit_for_bit(name, count):
    plain, watched = training_model(name), training_model(name)
    plain_losses, _ = train(plain, None)
    after = torch.get_rng_state()
    losses, engine = train(watched, engine_with(count))
    assert losses == plain_losses
    assert same_bits(plain, watched)
    assert torch.equal(torch.get_rng_state(), after)
    assert engine.steps_done == 6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama-tied"])
@pytest.mark.parametrize(
    "settings",
    [{"clip": 0.05}, {"micro_batches": 2}, {"autocast": True}, {"clip": 0.5, "micro_batches": 2, "autocast": True}],
    ids=lambda settings: "-".join(settings),
)
def test_clipping_accumulation_and_autocast_are_the_same_bit_for_bit(name, settings):
    plain, watched = training_model(name), training_model(name)
    plain_losses, _ = train(plain, None, **settings)
    losses, _ = train(watched, engine_with(), **settings)
    assert losses == plain_losses
    assert same_bits(plain, watched)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_is_the_same_bit_for_bit(reentrant):
    models = [training_model("gpt2") for _ in range(2)]
    for model in models:
        enable_checkpointing(model, use_reentrant=reentrant)
    plain_losses, _ = train(models[0], None)
    losses, _ = train(models[1], engine_with())
    assert losses == plain_losses
    assert same_bits(*models)


def test_second_order_is_the_same_bit_for_bit():
    plain, watched = training_model("gpt2"), training_model("gpt2")
    plain_losses, _ = train(plain, None, steps=5)
    losses, _ = train(watched, engine_with(second_order=True), steps=5)
    assert losses == plain_losses
    assert same_bits(plain, watched)


def test_frozen_layers_stay_frozen_and_flags_come_back():
    models = [training_model("llama") for _ in range(2)]
    for model in models:
        model.model.layers[0].requires_grad_(False)
        model.get_input_embeddings().eval()
    modes = {path: module.training for path, module in models[0].named_modules()}
    flags = [parameter.requires_grad for parameter in models[0].parameters()]
    plain_losses, _ = train(models[0], None)
    losses, _ = train(models[1], engine_with())
    assert losses == plain_losses
    assert same_bits(*models)
    assert {path: module.training for path, module in models[1].named_modules()} == modes
    assert [parameter.requires_grad for parameter in models[1].parameters()] == flags


def test_the_model_is_the_callers_own_outside_the_block():
    # B4.8: attaching a second time failed, evaluation had to detach by hand.
    model = training_model("gpt2")
    before = copy.deepcopy(model).state_dict().keys()
    for _ in range(2):
        train(model, engine_with(), steps=2)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        assert not any(parameter._backward_hooks for parameter in model.parameters())
        assert not any(getattr(p, "_post_accumulate_grad_hooks", None) for p in model.parameters())
    assert model.state_dict().keys() == before
