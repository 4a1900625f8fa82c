import pytest
import torch

from tests.architectures import build
from tests.online.workbench import DATA, HELD_OUT, mean_loss, named, validation
from tests.reference.online import flat_gradient, greedy_by_brute_force, sequence_loss, validation_loss
from vestige.errors import DataError, NonFinite, SpecError
from vestige.online import OnlineAttribution, greedy_selection

ROWS = [1, 4, 2, 7, 5, 0, 9]


@pytest.mark.parametrize("seed", range(20))
def test_greedy_picks_equal_brute_force(seed):
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(8, 5, generator=generator, dtype=torch.float64)
    gains, overlaps = gradients @ torch.randn(5, generator=generator, dtype=torch.float64), gradients @ gradients.T
    for k in (1, 3, 8):
        assert greedy_selection(gains, overlaps, k).rows == greedy_by_brute_force(gains, overlaps, k)


def test_a_copy_of_a_good_example_gives_way_to_another():
    gains = torch.tensor([1.0, 1.0, 0.6])
    overlaps = torch.tensor([[0.9, 0.9, 0.0], [0.9, 0.9, 0.0], [0.0, 0.0, 0.9]])
    picked = greedy_selection(gains, overlaps, 3)
    assert picked.rows == [0, 2, 1]
    assert picked.gains == pytest.approx([1.0, 0.6, 0.1])


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("k", [1, 3])
def test_the_engine_selects_as_gradients_formed_one_by_one_do(name, k):
    model, rate = build(name), 5.0
    parameters = list(model.parameters())
    losses = (sequence_loss(model, DATA.ids[r], DATA.targets[r]) / DATA.targets[r][1:].sum() for r in ROWS)
    gradients = torch.stack([flat_gradient(loss, parameters) for loss in losses]) * rate / k
    slope = flat_gradient(validation_loss(model, HELD_OUT, range(4)), parameters)
    gains, overlaps = gradients @ slope, gradients @ gradients.T
    found = OnlineAttribution(model, validation(4)).select(DATA.batch(ROWS, 2), k, learning_rate=rate)
    assert found.rows == greedy_by_brute_force(gains, overlaps, k)
    first = found.rows[0]
    assert found.gains[0] == pytest.approx(gains[first].item(), rel=1e-9)
    if k > 1:
        second = found.rows[1]
        assert found.gains[1] == pytest.approx((gains[second] - overlaps[first, second]).item(), rel=1e-9)


def test_the_step_after_selecting_is_a_step_on_the_subset():
    models = [build("gpt2", torch.float32).train() for _ in range(2)]
    engine = OnlineAttribution(models[0], validation(2))
    torch.manual_seed(0)
    chosen = [ROWS[place] for place in engine.select(DATA.batch(ROWS), 3, learning_rate=0.1).rows]
    assert all(parameter.grad is None for parameter in models[0].parameters())
    with engine.step(named(chosen), learning_rate=0.1):
        mean_loss(models[0], DATA.batch(chosen)).backward()
    torch.manual_seed(0)
    mean_loss(models[1], DATA.batch(chosen)).backward()
    pairs = zip(models[0].parameters(), models[1].parameters(), strict=True)
    assert all(torch.equal(one.grad, other.grad) for one, other in pairs)


def test_what_cannot_be_selected_is_refused():
    engine = OnlineAttribution(build("gpt2"), validation(2))
    with pytest.raises(SpecError, match="choose 1 to 7"):
        engine.select(DATA.batch(ROWS), 8, learning_rate=0.1)
    with pytest.raises(SpecError, match="learning rate"):
        engine.select(DATA.batch(ROWS), 2)
    with pytest.raises(NonFinite, match=r"\[1\]"):
        greedy_selection(torch.tensor([1.0, torch.nan]), torch.zeros(2, 2), 1)
    batch = DATA.batch(ROWS)
    left = {"input_ids": batch.input_ids, "labels": batch.labels, "attention_mask": torch.zeros_like(batch.labels)}
    with pytest.raises(DataError, match="padded on the left"):
        engine.select(left, 2, learning_rate=0.1)
