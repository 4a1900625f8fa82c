"""A parameter that the model reads outside the forward of its module has its exact gradient, or is refused by name."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.reference.gradients import loop_gradients
from vestige.errors import ModelError
from vestige.gradients import FunctionObjective, GradientPass, GradientSink
from vestige.models import Component, select_components

WIDTH = 6


class Scaled(nn.Linear):
    def forward(self, states: Tensor) -> Tensor:
        return 3.0 * super().forward(states)


class Router(nn.Linear):
    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        logits = super().forward(states)
        return logits.softmax(-1), logits


class Causal(nn.Conv1d):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images)[..., : images.shape[-1]]


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH))

    def forward(self, states: Tensor) -> Tensor:
        return functional.normalize(states, dim=-1) * self.weight


class Live(nn.Module):
    """Words, one part that uses its weights in its own way, and a classifier."""

    def __init__(self, use: Callable[["Live", Tensor, Tensor], Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.words, self.use = nn.Embedding(11, WIDTH), use
        for name, part in parts.items():
            self.add_module(name, part)
        self.classifier = nn.Linear(WIDTH, 3)
        self.register_buffer("scale", torch.linspace(0.5, 2.0, WIDTH))

    def forward(self, ids: Tensor) -> Tensor:
        states = self.words(ids)
        return self.classifier((states + self.use(self, states, ids)).tanh().mean(1))


def causal(images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As state-space models call their convolution: the weight without its middle axis."""
    padding, count = weight.shape[-1] - 1, images.shape[-1]
    return functional.conv1d(images, weight.unsqueeze(1), bias, padding=padding, groups=len(weight))[..., :count]


def linear(columns: int = WIDTH, rows: int = WIDTH, bias: bool = True) -> nn.Linear:
    return nn.Linear(columns, rows, bias=bias)


LIVE: dict[str, Callable[[], Live]] = {
    "convolution by function": lambda: Live(
        lambda m, x, ids: causal(x.mT, m.conv.weight.squeeze(1), m.conv.bias).mT,
        conv=nn.Conv1d(WIDTH, WIDTH, 3, groups=WIDTH),
    ),
    "full convolution by function": lambda: Live(
        lambda m, x, ids: functional.conv1d(x.mT, m.conv.weight, m.conv.bias, padding="same", dilation=2).mT,
        conv=nn.Conv1d(WIDTH, WIDTH, 3),
    ),
    "subclass of a convolution": lambda: Live(
        lambda m, x, ids: m.conv(x.mT).mT, conv=Causal(WIDTH, WIDTH, 3, padding=2, groups=WIDTH)
    ),
    "weight times columns": lambda: Live(
        lambda m, x, ids: (functional.softplus(m.part.weight @ x.transpose(1, 2) + m.part.bias.double()[:, None])).mT,
        part=linear(),
    ),
    "rows times weight": lambda: Live(lambda m, x, ids: x @ m.part.weight + m.part.bias, part=linear()),
    "tied by function": lambda: Live(
        lambda m, x, ids: functional.linear(functional.linear(x, m.words.weight), m.part.weight), part=linear(11)
    ),
    "partly by function": lambda: Live(
        lambda m, x, ids: m.part(x).tanh() + functional.linear(x, m.part.weight), part=linear()
    ),
    "subclass that scales": lambda: Live(lambda m, x, ids: m.part(x), part=Scaled(WIDTH, WIDTH)),
    "subclass that returns a tuple": lambda: Live(lambda m, x, ids: m.part(x)[0], part=Router(WIDTH, WIDTH)),
    "weight times a buffer": lambda: Live(
        lambda m, x, ids: functional.linear(x, m.part.weight * m.scale, m.part.bias * 2), part=linear()
    ),
    "slice of a weight": lambda: Live(
        lambda m, x, ids: functional.linear(x, m.part.weight[WIDTH:]), part=linear(WIDTH, 2 * WIDTH)
    ),
    "two weights joined": lambda: Live(
        lambda m, x, ids: (
            functional.linear(x, torch.cat([m.part.weight, m.other.weight])).unflatten(-1, (2, -1)).sum(-2)
        ),
        part=linear(),
        other=linear(),
    ),
    "LoRA merged into its base": lambda: Live(
        lambda m, x, ids: functional.linear(x, m.part.weight + 0.7 * (m.up.weight @ m.down.weight), m.part.bias),
        part=linear(),
        down=linear(WIDTH, 2, bias=False),
        up=linear(2, WIDTH, bias=False),
    ),
    "weight standardisation": lambda: Live(
        lambda m, x, ids: (
            functional.conv1d(x.mT, m.conv.weight / m.conv.weight.norm(dim=1, keepdim=True), padding=1).mT
        ),
        conv=nn.Conv1d(WIDTH, WIDTH, 3),
    ),
    "rows replaced before a look-up": lambda: Live(
        lambda m, x, ids: functional.embedding(ids, m.words.weight.index_copy(0, torch.tensor([2, 5]), m.part.weight)),
        part=linear(WIDTH, 2, bias=False),
    ),
    "norm by function": lambda: Live(
        lambda m, x, ids: functional.normalize(x, dim=-1) * m.norm.weight + m.norm.bias, norm=nn.LayerNorm(WIDTH)
    ),
    "called twice": lambda: Live(lambda m, x, ids: m.part(m.part(x).tanh()), part=linear()),
    "its output scaled by a hook": lambda: Live(lambda m, x, ids: m.part(x), part=hooked(linear())),
    "flattened tokens": lambda: Live(
        lambda m, x, ids: functional.linear(x.flatten(0, 1), m.part.weight, m.part.bias).view_as(x), part=linear()
    ),
    "parameter of its own": lambda: Live(
        lambda m, x, ids: functional.linear(x, m.part.weight.outer(m.part.weight)), part=Normed()
    ),
    "never used": lambda: Live(lambda m, x, ids: x, part=linear()),
    "used without its gradient": lambda: Live(lambda m, x, ids: x @ m.part.weight.detach(), part=linear()),
    "looked at": lambda: Live(
        lambda m, x, ids: m.part(x.to(m.part.weight)) + torch.zeros_like(m.part.weight).sum() + m.part.weight.shape[0],
        part=linear(),
    ),
}
"""Every way of using a weight that has an exact gradient."""


class Opaque(torch.autograd.Function):
    """A kernel that no function mode sees."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(states, weight)
        return states @ weight.T

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, Tensor]:
        states, weight = ctx.saved_tensors
        return outer[0] @ weight, outer[0].flatten(0, 1).T @ states.flatten(0, 1)


REFUSED: dict[str, Callable[[], Live]] = {
    "einsum": lambda: Live(lambda m, x, ids: torch.einsum("etc,oc->eto", x, m.part.weight), part=linear(bias=False)),
    "a kernel": lambda: Live(lambda m, x, ids: Opaque.apply(x, m.part.weight), part=linear(bias=False)),
    "beside its module": lambda: Live(
        lambda m, x, ids: m.part(x) + torch.einsum("etc,oc->eto", x, m.part.weight), part=linear(bias=False)
    ),
    "rows by index": lambda: Live(lambda m, x, ids: m.part.weight[ids], part=linear(WIDTH, 11, bias=False)),
    "attention of PyTorch": lambda: Live(
        lambda m, x, ids: m.part.attention(x, x, x)[0],
        part=nn.ModuleDict({"attention": nn.MultiheadAttention(WIDTH, 2, batch_first=True)}),
    ),
}
"""Ways without a rule: the part's weight must be named."""


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda module, inputs, output: output * 0.5)
    return module


def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def build(make: Callable[[], Live]) -> tuple[Live, Tensor, Tensor]:
    torch.manual_seed(0)
    return make().double().eval(), torch.randint(11, (6, 4)), torch.tensor([0, 1, 2, 2, 1, 0])


def gradients_of(
    model: nn.Module, batches: list[tuple[Tensor, Tensor]], patterns: tuple[str, ...] = ("all",)
) -> tuple[tuple[Component, ...], list[Tensor]]:
    components = select_components(model, patterns).components
    found: list[list[Tensor]] = []
    with GradientPass(model, components, FunctionObjective(losses)) as gradient_pass:
        for batch in batches:
            sink = GradientSink(components)
            sink.begin(len(batch[0]), "cpu", torch.float64)
            gradient_pass.run(batch, sink)
            found.append(sink.gradients)
    return components, [torch.cat(parts) for parts in zip(*found, strict=True)]


@pytest.mark.parametrize("name", LIVE)
@pytest.mark.parametrize("patterns", [("all",), ("all", "!words.*", "!classifier.*")])
def test_every_use_with_a_rule_is_exact_in_every_batch(name: str, patterns: tuple[str, ...]) -> None:
    """The second and third batch run without looking at every function, where nothing was found outside a module."""
    if len(patterns) > 1 and name in ("parameter of its own", "never used", "used without its gradient"):
        pytest.skip("nothing is left that has a gradient")
    model, ids, labels = build(LIVE[name])
    batches = [(ids[start : start + 2], labels[start : start + 2]) for start in (0, 2, 4)]
    components, gradients = gradients_of(model, batches, patterns)
    expected = loop_gradients(model, losses, [(ids[row : row + 1], labels[row : row + 1]) for row in range(6)])
    for component, gradient in zip(components, gradients, strict=True):
        for row in range(6):
            wanted = expected[row][component.name].reshape(component.shape)
            assert float((gradient[row] - wanted).norm()) <= 1e-10 * (1e-3 + float(wanted.norm())), component.name


@pytest.mark.parametrize("name", REFUSED)
def test_a_use_without_a_rule_is_refused_by_name(name: str) -> None:
    model, ids, labels = build(REFUSED[name])
    with pytest.raises(ModelError, match=r"The model uses part\.(attention\.out_proj\.)?weight.*!part\."):
        gradients_of(model, [(ids, labels)])
    assert all(parameter.grad is None for parameter in model.parameters())
    rest = gradients_of(model, [(ids, labels)], ("all", "!part.*"))
    expected = loop_gradients(model, losses, [(ids[:1], labels[:1])])[0]
    for component, gradient in zip(*rest, strict=True):
        assert torch.allclose(gradient[0], expected[component.name].reshape(component.shape), rtol=1e-9, atol=1e-12)


def test_a_use_that_only_a_later_batch_has_is_refused() -> None:
    model, ids, labels = build(
        lambda: Live(
            lambda m, x, ids: Opaque.apply(x, m.part.weight) if x.shape[1] > 2 else m.part(x), part=linear(bias=False)
        )
    )
    gradients_of(model, [(ids[:, :2], labels)])
    with pytest.raises(ModelError, match=r"The model uses part\.weight"):
        gradients_of(model, [(ids[:, :2], labels), (ids, labels)])


def test_a_module_that_only_a_later_batch_calls_is_exact() -> None:
    model, ids, labels = build(
        lambda: Live(lambda m, x, ids: functional.linear(x, m.part.weight) if x.shape[1] > 2 else x, part=linear())
    )
    components, gradients = gradients_of(model, [(ids[:, :2], labels), (ids, labels)])
    expected = loop_gradients(model, losses, [(ids[:1], labels[:1])])[0]
    for component, gradient in zip(components, gradients, strict=True):
        assert torch.allclose(gradient[6], expected[component.name].reshape(component.shape), rtol=1e-9, atol=1e-12)
