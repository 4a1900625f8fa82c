import pytest
import torch

from tests.architectures import build
from tests.online.workbench import DATA, HELD_OUT, mean_loss, named, validation
from tests.reference.online import dense_hessian, shares, validation_loss
from vestige.errors import SpecError
from vestige.gradients import FunctionObjective
from vestige.online import OnlineAttribution

ROWS = [1, 4, 2]
RATE = 0.05


def trained(name: str, patterns: list[str]):
    model = build(name)
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in parameter_name for part in patterns))
    return model, [parameter for parameter in model.parameters() if parameter.requires_grad]


def step_on(model, optimizer=None, **settings):
    engine = OnlineAttribution(model, validation(2), optimizer=optimizer, **settings)
    with engine.step(named(ROWS), learning_rate=None if optimizer else RATE) as step:
        mean_loss(model, DATA.batch(ROWS)).backward()
    return step.result


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "patterns"),
    [("gpt2", ["h.1.attn.c_proj", "ln_f"]), ("llama", ["layers.1.self_attn.k_proj", "norm"])],
)
def test_the_term_equals_the_dense_hessian(name, patterns):
    model, parameters = trained(name, patterns)
    hessian = dense_hessian(model, lambda m: validation_loss(m, HELD_OUT, range(2)), parameters)
    first, second = step_on(model), None
    model.zero_grad()
    second = step_on(model, second_order=True)
    found = shares(model, DATA, ROWS, parameters)
    expected = first.influence - 0.5 * RATE**2 * found @ hessian @ found.sum(0)
    assert not torch.allclose(second.influence, first.influence, rtol=1e-6)
    torch.testing.assert_close(second.influence, expected, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(second.score, first.score)


def test_the_sign_is_that_of_the_taylor_expansion():
    """Halving the rate divides the error by four to first order, by eight to second."""

    def errors(rate: float) -> tuple[float, float]:
        model, parameters = trained("gpt2", [""])
        optimizer = torch.optim.SGD(parameters, lr=rate)
        before = validation_loss(model, HELD_OUT, range(2)).item()
        found = step_on(model, optimizer, second_order=True)
        optimizer.step()
        fall = before - validation_loss(model, HELD_OUT, range(2)).item()
        return abs(rate * found.score.sum().item() - fall), abs(found.influence.sum().item() - fall)

    (first, second), (half_first, half_second) = errors(2e-3), errors(1e-3)
    assert first / half_first == pytest.approx(4, rel=0.1)
    assert second / half_second == pytest.approx(8, rel=0.2)
    assert second < 0.1 * first


@pytest.mark.slow
def test_micro_batches_meet_each_other_in_the_curvature():
    model, parameters = trained("llama", ["layers.1.self_attn.k_proj", "norm"])
    hessian = dense_hessian(model, lambda m: validation_loss(m, HELD_OUT, range(2)), parameters)
    engine = OnlineAttribution(model, validation(2), second_order=True)
    with engine.step(learning_rate=RATE) as step:
        for rows in (ROWS[:1], ROWS[1:]):
            step.batch(named(rows))
            (mean_loss(model, DATA.batch(rows)) / 2).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.1)
    factor = parameters[0].grad.norm()
    found = torch.cat([shares(model, DATA, rows, parameters) / 2 for rows in (ROWS[:1], ROWS[1:])])
    found *= 0.1 / found.sum(0).norm()
    assert factor <= 0.1
    expected = RATE * step.result.score - 0.5 * RATE**2 * found @ hessian @ found.sum(0)
    torch.testing.assert_close(step.result.influence, expected, rtol=1e-4, atol=1e-12)


def test_another_loss_than_the_causal_is_refused():
    model = build("gpt2")
    with pytest.raises(SpecError, match="CausalLoss"):
        OnlineAttribution(
            model, validation(2), second_order=True, objective=FunctionObjective(lambda m, b: m(b.input_ids).logits)
        )
