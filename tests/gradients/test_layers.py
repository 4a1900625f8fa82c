"""Convolutions, group norms and small classifiers: factors equal plain autograd, one example at a time."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.reference.gradients import loop_gradients
from vestige.errors import ModelError
from vestige.gradients import DotSink, FunctionObjective, GradientPass, GradientSink, NormSink
from vestige.models import Component, select_components


class Images(nn.Sequential):
    """Layers, a mean over positions and a classifier of three classes."""

    def __init__(self, *layers: nn.Module, channels: int) -> None:
        super().__init__(*layers, nn.Flatten(2))
        self.classifier = nn.Linear(channels, 3)

    def forward(self, images: Tensor) -> Tensor:
        for layer in list(self)[:-1]:
            images = layer(images)
        return self.classifier(images.tanh().mean(-1))


def conv1d() -> nn.Module:
    return Images(
        nn.Conv1d(4, 6, 3, padding=1), nn.ReLU(), nn.Conv1d(6, 5, 4, stride=2, dilation=2, bias=False), channels=5
    )


def conv2d() -> nn.Module:
    return Images(
        nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
        nn.GroupNorm(3, 6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 5, 3, padding="same", padding_mode="reflect"),
        channels=5,
    )


def grouped() -> nn.Module:
    return Images(
        nn.Conv2d(4, 8, 3, groups=2, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, groups=8, padding=1),
        nn.GroupNorm(1, 8),
        channels=8,
    )


def conv3d() -> nn.Module:
    return Images(nn.Unflatten(1, (2, 2)), nn.Conv3d(2, 4, 2, padding=1, stride=(1, 2, 2)), channels=4)


def transposed() -> nn.Module:
    return Images(
        nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1),
        nn.GELU(),
        nn.ConvTranspose2d(6, 4, (2, 3), groups=2, dilation=2),
        channels=4,
    )


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(4 * 7 * 8, 9), nn.ReLU(inplace=True), nn.LayerNorm(9), nn.Linear(9, 3, bias=False)
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (conv1d, (4, 15)),
    "conv2d": (conv2d, (4, 7, 8)),
    "conv2d-groups": (grouped, (4, 7, 8)),
    "conv3d": (conv3d, (4, 7, 8)),
    "conv-transpose": (transposed, (4, 5, 4)),
    "mlp": (perceptron, (4, 7, 8)),
}


def build(name: str, examples: int = 4) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model = make().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, torch.randn(examples, *shape, dtype=torch.float64), torch.randint(3, (examples,))


def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def gradients_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[tuple[Component, ...], list[Tensor]]:
    components = select_components(model, ("all",)).components
    sink = GradientSink(components)
    sink.begin(len(batch[0]), "cpu", torch.float64)
    with GradientPass(model, components, FunctionObjective(losses)) as gradient_pass:
        gradient_pass.run(batch, sink)
    return components, sink.gradients


@pytest.mark.parametrize("name", MODELS)
def test_gradients_equal_plain_autograd(name: str) -> None:
    model, images, labels = build(name)
    components, gradients = gradients_of(model, (images, labels))
    expected = loop_gradients(model, losses, [(images[row : row + 1], labels[row : row + 1]) for row in range(4)])
    assert [component.name for component in components] == list(expected[0])
    for component, gradient in zip(components, gradients, strict=True):
        for row in range(4):
            wanted = expected[row][component.name].reshape(component.shape)
            assert float((gradient[row] - wanted).norm()) <= 1e-10 * (1 + float(wanted.norm())), component.name


@pytest.mark.parametrize("name", ["conv1d", "conv2d", "conv2d-groups", "conv-transpose"])
def test_conv_dot_products_with_four_validation_samples_have_no_cross_terms(name: str) -> None:
    """Summing the activations and the output gradients of the samples separately would be off by whole multiples."""
    model, images, labels = build(name, examples=7)
    components, queries = gradients_of(model, (images[:4], labels[:4]))
    train = (images[4:], labels[4:])
    _, rows = gradients_of(model, train)
    sink, norms = DotSink(queries), NormSink(components)
    sink.begin(3)
    norms.begin(3)
    with GradientPass(model, components, FunctionObjective(losses)) as gradient_pass:
        gradient_pass.run(train, sink)
        gradient_pass.run(train, norms)
    for number in range(len(components)):
        wanted = queries[number].flatten(1) @ rows[number].flatten(1).T
        assert torch.allclose(sink.scores[number], wanted, rtol=1e-10, atol=1e-13)
    wanted = torch.stack([row.flatten(1).square().sum(1) for row in rows])
    assert torch.allclose(norms.finish(), wanted, rtol=1e-10)


def test_batch_norm_in_training_mode_is_refused_and_never_has_a_rule() -> None:
    torch.manual_seed(0)
    model = Images(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), channels=6).double()
    images, labels = torch.randn(4, 4, 7, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    with pytest.raises(ModelError, match=r"1 \(BatchNorm2d\) normalises with the statistics of the batch.*eval"):
        gradients_of(model, (images, labels))
    components, gradients = gradients_of(model.eval(), (images, labels))
    rows = {row.name: row.reason for row in select_components(model, ("all",)).coverage if not row.selected}
    assert rows == {"1.weight": "no rule for 'weight' of BatchNorm2d", "1.bias": "no rule for 'bias' of BatchNorm2d"}
    expected = loop_gradients(model, losses, [(images[:1], labels[:1])])[0]
    assert torch.allclose(gradients[0][0], expected[components[0].name].flatten(1), rtol=1e-10)


def test_an_input_changed_in_place_is_found_out() -> None:
    class Careless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, values: Tensor) -> Tensor:
            values = values.clone()
            once = self.first(values)
            return once + self.second(values.mul_(2))

    batch = (torch.randn(4, 4), torch.tensor([0, 1, 2, 0]))
    with pytest.raises(ModelError, match="Linear was changed in place"):
        gradients_of(Careless(), batch)


def test_positions_without_a_batch_axis_are_shared_by_the_examples() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.places, self.classifier = nn.Embedding(9, 5), nn.Embedding(6, 5), nn.Linear(5, 3)

        def forward(self, ids: Tensor) -> Tensor:
            states = self.words(ids) + self.places(torch.arange(ids.shape[1]))
            return self.classifier(states.tanh().mean(1))

    torch.manual_seed(0)
    model = Positions().double()
    ids, labels = torch.randint(9, (4, 6)), torch.tensor([0, 1, 2, 0])
    components, gradients = gradients_of(model, (ids, labels))
    expected = loop_gradients(model, losses, [(ids[row : row + 1], labels[row : row + 1]) for row in range(4)])
    for component, gradient in zip(components, gradients, strict=True):
        for row in range(4):
            assert torch.allclose(gradient[row], expected[row][component.name].reshape(component.shape), rtol=1e-10)
    with pytest.raises(ModelError, match="may be positions or one id per example"):
        gradients_of(model, (ids[:, :4], labels))
