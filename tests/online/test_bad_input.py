import pytest
import torch
from torch import nn

from tests.architectures import build
from tests.online.workbench import DATA, mean_loss, named, validation
from vestige.data import NO_TARGET
from vestige.errors import DataError, ModelError, NonFinite, SpecError, UserError
from vestige.gradients import FunctionObjective
from vestige.online import OnlineAttribution, OnlineLog

ROWS = [1, 4, 2]


def engine_on(model=None, **settings) -> OnlineAttribution:
    return OnlineAttribution(model or build("gpt2", torch.float32), validation(2), **settings)


def test_a_loss_that_is_nan_names_the_ids_and_keeps_the_log(tmp_path):
    model = build("gpt2", torch.float32)
    engine = engine_on(model, out=tmp_path / "log")
    with engine.step(named(ROWS), learning_rate=0.1):
        mean_loss(model, DATA.batch(ROWS)).backward()
    batch = DATA.batch(ROWS)
    damage = torch.tensor([1.0, torch.nan, 1.0])[:, None, None]

    def damaged_step():
        with engine, engine.step(named(ROWS), learning_rate=0.1):
            (damage * model.transformer(input_ids=batch.input_ids).last_hidden_state).sum().backward()

    with pytest.raises(NonFinite, match=r"Step 2: the gradient of 'example-4' is not finite"):
        damaged_step()
    assert OnlineLog.open(tmp_path / "log").last_step() == 1
    assert not any(module._forward_hooks for module in model.modules())


def test_diverged_weights_name_a_validation_example():
    model = build("gpt2", torch.float32)
    engine = engine_on(model)
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(torch.nan)
    with pytest.raises(NonFinite, match="validation example '0'"), engine.step(["a"], learning_rate=0.1):
        pass


def test_ids_that_do_not_fit_the_batch_are_refused():
    engine = engine_on()
    with pytest.raises(DataError, match="3 examples and 2 ids"), engine.step(["a", "b"], learning_rate=0.1):
        mean_loss(engine.model, DATA.batch(ROWS))
    with pytest.raises(DataError, match="at least one id"), engine.step([], learning_rate=0.1):
        pass
    with pytest.raises(UserError, match="Whose gradients"), engine.step(learning_rate=0.1):
        mean_loss(engine.model, DATA.batch(ROWS))
    assert engine.steps_done == 0


def test_a_step_without_a_backward_pass_is_told():
    engine = engine_on()
    with pytest.raises(UserError, match=r"loss\.backward\(\) inside"), engine.step(named(ROWS), learning_rate=0.1):
        mean_loss(engine.model, DATA.batch(ROWS))


def test_settings_that_make_no_sense_are_refused(tmp_path):
    with pytest.raises(SpecError, match="learning rate of the step"):
        engine_on().step(named(ROWS))
    with pytest.raises(ModelError, match="requires_grad"):
        engine_on(build("gpt2", torch.float32).requires_grad_(False))
    with pytest.raises(SpecError, match="start_step=-1"):
        engine_on(start_step=-1)
    with pytest.raises(UserError, match="flush_every=0"):
        engine_on(out=tmp_path / "log", flush_every=0)
    batch = validation(2)
    empty = batch._replace(labels=torch.full_like(batch.labels, NO_TARGET))
    with pytest.raises(DataError, match="no target token"):
        OnlineAttribution(build("gpt2"), empty)


def test_evaluation_inside_a_block_is_not_observed():
    model = build("gpt2")
    engine = engine_on(model)
    with engine.step(named(ROWS), learning_rate=0.1) as plain:
        mean_loss(model, DATA.batch(ROWS)).backward()
    model.zero_grad()
    with engine.step(named(ROWS), learning_rate=0.1) as step:
        loss = mean_loss(model, DATA.batch(ROWS))
        with torch.no_grad():
            mean_loss(model, DATA.batch([0, 1, 2, 3, 5]))
        loss.backward()
    assert torch.equal(step.result.score, plain.result.score)


def test_experts_are_left_out_and_said_so(capfd):
    model = build("mixtral")
    engine = engine_on(model)
    assert not any("experts" in component.name for component in engine.components)
    assert "leave out" in capfd.readouterr().err
    with engine.step(named(ROWS), learning_rate=0.1) as step:
        mean_loss(model, DATA.batch(ROWS)).backward()
    assert step.result.score.isfinite().all()


class Classifier(nn.Module):
    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(12, 8), nn.BatchNorm1d(8) if norm else nn.LayerNorm(8), nn.ReLU(inplace=True), nn.Linear(8, 5)
        )

    def forward(self, x):
        return self.layers(x)


def losses(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def classifier_batch(size: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 12, generator=generator, dtype=torch.float64)
    return x, torch.randint(5, (size,), generator=generator)


def test_a_plain_classifier_trains_with_scores():
    torch.manual_seed(0)
    model, (x, y) = Classifier(norm=False).double(), classifier_batch(7, 0)
    held_out = classifier_batch(3, 1)
    engine = OnlineAttribution(model, held_out, objective=FunctionObjective(losses))
    with engine.step(range(7), learning_rate=0.1) as step:
        nn.functional.cross_entropy(model(x), y).backward()
    parameters = list(model.parameters())
    slope = torch.autograd.grad(losses(model, held_out).mean(), parameters)
    for place in range(7):
        share = torch.autograd.grad(losses(model, (x, y))[place] / 7, parameters)
        expected = sum((one * other).sum() for one, other in zip(share, slope, strict=True))
        assert step.result.score[place].item() == pytest.approx(expected.item(), rel=1e-9)
    assert step.result.ids == tuple("0123456")


def test_an_own_objective_reads_its_own_dictionaries():
    def of_dict(model, batch):
        return losses(model, (batch["inputs"], batch["labels"]))

    torch.manual_seed(0)
    model, (x, y), (held_x, held_y) = Classifier(norm=False).double(), classifier_batch(7, 0), classifier_batch(3, 1)
    held_out = {"inputs": held_x, "labels": held_y}
    pairs = OnlineAttribution(model, (held_x, held_y), objective=FunctionObjective(losses))
    named = OnlineAttribution(model, held_out, objective=FunctionObjective(of_dict))
    scores = []
    for engine in (pairs, named):
        with engine.step(range(7), learning_rate=0.1) as step:
            nn.functional.cross_entropy(model(x), y).backward()
        scores.append(step.result.score)
    torch.testing.assert_close(scores[1], scores[0], rtol=0, atol=0)
    wanted = pairs.select((x, y), 3, learning_rate=0.1)
    assert named.select({"inputs": x, "labels": y}, 3, learning_rate=0.1) == wanted


def test_batch_statistics_are_refused():
    model, (x, y) = Classifier(norm=True).double(), classifier_batch(7, 0)
    engine = OnlineAttribution(model, (x, y), objective=FunctionObjective(losses))
    with pytest.raises(ModelError, match="BatchNorm1d"), engine.step(range(7), learning_rate=0.1):
        pass
