import numpy as np
import pytest
import torch

from tests.architectures import CAUSAL
from tests.reference import unlearn as reference
from tests.untrac.conftest import loaded_model, query_data, training_data
from vestige.methods import AscentRecipe, ascend, borrow_weights, compute_losses, loss_weights, shuffle_batches

ROWS = np.arange(7)


def climb(loaded, recipe, rows=ROWS, **borrowed):
    data, queries = training_data(), query_data()
    with borrow_weights(loaded, **borrowed) as weights:
        return ascend(weights, data, rows, lambda: compute_losses(weights.model, queries, "sum", 64), recipe)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_an_ascent_is_the_one_written_out_by_hand(optimizer):
    loaded = loaded_model()
    recipe = AscentRecipe(3e-3, 4, 3, optimizer, seed=5)
    done = climb(loaded, recipe)
    data, queries = training_data(), query_data()
    batches = shuffle_batches(data, ROWS, 3, 4, 5)
    moved = reference.climbed(loaded.model, data, batches, 3e-3, optimizer)
    pairs = zip(queries.input_ids, queries.targets, strict=True)
    expected = [reference.example_loss(moved, *pair).item() for pair in pairs]
    assert np.allclose(done.after[0].numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "rmsprop", "adafactor"])
def test_every_optimizer_climbs(optimizer):
    recipe = AscentRecipe(1e-2 if optimizer != "sgd" else 0.03, 6, 12, optimizer)
    done = climb(loaded_model(), recipe, np.arange(12))
    assert bool((done.batch_loss.diff() > 0).all())


@pytest.mark.parametrize("architecture", CAUSAL)
def test_a_batch_in_several_passes_is_the_same_step(architecture):
    small, large = (
        climb(loaded_model(architecture), AscentRecipe(1e-2, 2, 7, token_budget=budget)) for budget in (8, 4096)
    )
    assert np.allclose(small.after.numpy(), large.after.numpy(), rtol=1e-8)
    assert np.allclose(small.batch_loss.numpy(), large.batch_loss.numpy(), rtol=1e-9)


def test_trap_set_losses_are_no_means_of_batch_means():
    loaded, data = loaded_model(), training_data()
    with borrow_weights(loaded) as weights:
        found = compute_losses(weights.model, data, "sum", 16, ROWS).sum() / loss_weights(data, "sum")[ROWS].sum()
        batch = weights.backward(data, ROWS, "sum", 16)
    expected = reference.set_loss(loaded.model, data, ROWS).item()
    assert found == pytest.approx(expected, rel=1e-10)
    assert batch == pytest.approx(expected, rel=1e-10)


def test_trap_losses_of_examples_do_not_depend_on_what_they_are_batched_with():
    data = training_data()
    with borrow_weights(loaded_model()) as weights:
        alone, together = (compute_losses(weights.model, data, "sum", budget) for budget in (1, 4096))
    assert np.allclose(alone, together, rtol=1e-12)
    assert len(set(np.round(alone, 9))) == 12


def test_trap_dropout_is_off_while_unlearning():
    loaded = loaded_model()
    # As a careless caller may leave it.
    loaded.model.train()
    for module in loaded.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    recipe = AscentRecipe(1e-2, 3, 4)
    assert torch.equal(climb(loaded, recipe).after, climb(loaded, recipe).after)


def test_checkpointed_layers_give_the_same_ascent_and_are_gone_afterwards():
    loaded, recipe = loaded_model("llama"), AscentRecipe(1e-2, 3, 4)
    plain = climb(loaded, recipe)
    checkpointed = climb(loaded, recipe, checkpointing=True)
    assert np.allclose(plain.after.numpy(), checkpointed.after.numpy(), rtol=1e-10)
    assert not any("forward" in vars(module) for module in loaded.model.modules())


def test_looks_are_even_and_end_at_the_last_step():
    assert AscentRecipe(1.0, 5, 1, points=4).looks == [1, 2, 4, 5]
    assert AscentRecipe(1.0, 2, 1, points=8).looks == [1, 2]


def test_a_loss_that_overflows_leaves_nan_and_the_weights_as_they_were():
    loaded = loaded_model(dtype=torch.float32)
    before = {name: value.clone() for name, value in loaded.model.named_parameters()}
    done = climb(loaded, AscentRecipe(1e38, 4, 4, "sgd"))
    assert not torch.isfinite(done.after).all()
    assert all(torch.equal(before[name], value) for name, value in loaded.model.named_parameters())
