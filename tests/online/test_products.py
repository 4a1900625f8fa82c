import pytest
import torch
from torch import nn

from tests.architectures import CAUSAL, build, enable_checkpointing
from tests.online.workbench import (
    DATA,
    HELD_OUT,
    inputs,
    mean_loss,
    named,
    training_model,
    validation,
)
from tests.reference.online import flat_gradient, shares, validation_loss
from vestige.online import OnlineAttribution

ROWS = [1, 4, 2, 7, 5]


def online_scores(model: nn.Module, count: int, rows=ROWS, **settings):
    engine = OnlineAttribution(model, validation(count), **settings)
    with engine.step(named(rows), learning_rate=0.1) as step:
        mean_loss(model, DATA.batch(rows, extra_padding=2)).backward()
    assert step.result is not None
    return step.result


def reference(model: nn.Module, count: int, parameters, rows=ROWS) -> torch.Tensor:
    slope = flat_gradient(validation_loss(model, HELD_OUT, range(count)), parameters)
    return shares(model, DATA, rows, parameters) @ slope


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("name", [*CAUSAL])
def test_products_equal_autograd_of_each_example(name, count):
    # B4.1 cross-sample terms with several validation examples, B4.2 tied weights, B4.3 label masks, B4.7 Llama-style.
    model = build(name)
    found = online_scores(model, count)
    expected = reference(model, count, list(model.parameters()))
    torch.testing.assert_close(found.score, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.influence, 0.1 * expected, rtol=1e-9, atol=1e-12)
    assert found.validation_loss == pytest.approx(validation_loss(model, HELD_OUT, range(count)).item())


def test_trap_b4_1_conv1d_with_four_validation_examples():
    model = build("gpt2")
    parameters = [p for name, p in model.named_parameters() if "c_fc.weight" in name or "c_attn.weight" in name]
    found = online_scores(model, 4, components=("*.c_fc.weight", "*.c_attn.weight"))
    torch.testing.assert_close(found.score, reference(model, 4, parameters), rtol=1e-9, atol=1e-12)


def test_trap_b4_2_a_tied_embedding_keeps_its_cross_terms():
    model = build("gpt2")
    found = online_scores(model, 4, components=("transformer.wte.weight",))
    expected = reference(model, 4, [model.transformer.wte.weight])
    torch.testing.assert_close(found.score, expected, rtol=1e-9, atol=1e-12)


def test_trap_b4_3_shares_of_uneven_label_masks_add_up_to_the_gradient():
    model = build("llama")
    found = online_scores(model, 4)
    slope = flat_gradient(validation_loss(model, HELD_OUT, range(4)), list(model.parameters()))
    step = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    assert float(found.score.sum()) == pytest.approx(float(step @ slope), rel=1e-10)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_norm_scales_and_shifts_alone(name):
    model = build(name)
    parameters = [p for n, p in model.named_parameters() if "norm" in n or "ln_" in n]
    found = online_scores(model, 4, components=("norm",))
    torch.testing.assert_close(found.score, reference(model, 4, parameters), rtol=1e-9, atol=1e-12)


def test_the_fall_of_the_validation_loss_is_rate_times_the_sum_of_scores():
    model = build("gpt2-untied")
    before = validation_loss(model, HELD_OUT, range(4)).item()
    found = online_scores(model, 4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 1e-6 * parameter.grad
    fall = before - validation_loss(model, HELD_OUT, range(4)).item()
    assert fall == pytest.approx(1e-6 * float(found.score.sum()), rel=1e-4)


def test_frozen_parameters_are_not_scored():
    model = build("llama")
    model.model.layers[0].requires_grad_(False)
    model.get_input_embeddings().requires_grad_(False)
    found = online_scores(model, 4)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    torch.testing.assert_close(found.score, reference(model, 4, trained), rtol=1e-9, atol=1e-12)


def test_lora_matrices_are_scored_and_the_base_is_not():
    model = build("llama-lora")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = online_scores(model, 4)
    torch.testing.assert_close(found.score, reference(model, 4, trained), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_score(reentrant):
    model = build("llama").train()
    expected = online_scores(model, 4).score
    model.zero_grad()
    enable_checkpointing(model, use_reentrant=reentrant)
    torch.testing.assert_close(online_scores(model, 4).score, expected, rtol=1e-9, atol=1e-12)


def test_parameter_groups_are_weighed_by_their_rates():
    model = build("gpt2")
    embedding = [model.transformer.wte.weight, model.transformer.wpe.weight]
    others = [p for p in model.parameters() if all(p is not other for other in embedding)]
    optimizer = torch.optim.SGD([{"params": embedding, "lr": 0.5}, {"params": others, "lr": 0.01}])
    engine = OnlineAttribution(model, validation(4), optimizer=optimizer)
    with engine.step(named(ROWS)) as step:
        mean_loss(model, DATA.batch(ROWS)).backward()
    expected = 0.5 * reference(model, 4, embedding) + 0.01 * reference(model, 4, others)
    torch.testing.assert_close(step.result.influence, expected, rtol=1e-9, atol=1e-12)
    assert step.result.learning_rate is None


@pytest.mark.parametrize("loss_scale", [1.0, 1024.0])
def test_scores_are_shares_in_the_clipped_gradient(loss_scale):
    model = build("llama")
    plain = online_scores(model, 4)
    model.zero_grad()
    engine = OnlineAttribution(model, validation(4))
    with engine.step(named(ROWS), learning_rate=0.1) as step:
        (loss_scale * mean_loss(model, DATA.batch(ROWS, 2))).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.05) / loss_scale
    assert norm > 0.1
    torch.testing.assert_close(step.result.score, plain.score * 0.05 / norm, rtol=1e-4, atol=0)


def test_micro_batches_of_a_step_are_one_step():
    model = build("gpt2")
    whole = OnlineAttribution(model, validation(4))
    with whole.step(learning_rate=0.1) as step:
        for rows in (ROWS[:2], ROWS[2:]):
            step.batch(named(rows))
            (mean_loss(model, DATA.batch(rows)) / 2).backward()
    parameters = list(model.parameters())
    expected = torch.cat([reference(model, 4, parameters, rows) / 2 for rows in (ROWS[:2], ROWS[2:])])
    torch.testing.assert_close(step.result.score, expected, rtol=1e-9, atol=1e-12)
    assert (step.result.step, step.result.ids) == (1, tuple(named(ROWS)))


@pytest.mark.parametrize("name", ["gpt2", "llama-tied"])
def test_autocast_to_bfloat16_stays_near_the_exact_products(name):
    exact = online_scores(build(name), 4).score
    model = build(name, torch.float32)
    engine = OnlineAttribution(model, validation(4), context=lambda: torch.autocast("cpu", torch.bfloat16))
    with engine.step(named(ROWS), learning_rate=0.1) as step:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**inputs(DATA.batch(ROWS, extra_padding=2))).loss
        loss.backward()
    # bfloat16 has 8 bits: each of the two factors is off by about 2^-9, rounding along the layers adds up.
    assert float((step.result.score - exact).norm() / exact.norm()) < 0.03


def test_the_training_mode_has_its_own_shares_and_the_validation_none():
    model = training_model("gpt2", dropout=0.5)
    first = online_scores(model, 1)
    second = online_scores(model, 1)
    assert first.validation_loss == second.validation_loss
    assert not torch.allclose(first.score, second.score)
