"""The checks that GhostSuite once had, and what broke LoGra and FactGraSS elsewhere, replayed on small classifiers."""

import math

import pytest
import torch
from torch import nn

from tests.reference.compress_dense import matrix_of
from tests.reference.gradients import loop_gradients
from vestige.compress import CompressingSink, Compressor, Sjlt, Stream, logra, parse_spec
from vestige.gradients import DotSink, FunctionObjective, GradientPass, GradientSink
from vestige.models import Component, select_components


class Perceptron(nn.Module):
    """Inputs that are plain vectors: one token an example, no token axis."""

    def __init__(self, inputs: int, hidden: int, outputs: int, norm: bool = False) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(inputs, hidden), nn.Linear(hidden, outputs)
        self.norm = nn.LayerNorm(hidden) if norm else nn.Identity()

    def forward(self, values):
        return self.fc2(torch.relu(self.norm(self.fc1(values))))


def losses(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def mean_loss(model, batch):
    return losses(model, batch).mean()


def batch_of(count: int, inputs: int, outputs: int, seed: int = 1234) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, inputs, generator=generator), torch.randint(outputs, (count,), generator=generator)


def model_of(*sizes: int, norm: bool = False, seed: int = 42) -> Perceptron:
    torch.manual_seed(seed)
    return Perceptron(*sizes, norm=norm)


def weights(model: nn.Module) -> tuple[Component, ...]:
    return select_components(model, ("fc*.weight",)).components


def projected(model, batch, compressors: list[Compressor]) -> torch.Tensor:
    starts = [sum(one.size for one in compressors[:number]) for number in range(len(compressors))]
    sink = CompressingSink(compressors, starts, sum(one.size for one in compressors))
    sink.begin(len(batch[0]), "cpu")
    with GradientPass(model, weights(model), FunctionObjective(losses)) as gradient_pass:
        gradient_pass.run(batch, sink)
    return sink.gradients


def projected_one_by_one(model, batch, compressors: list[Compressor]) -> torch.Tensor:
    """`P_out G P_in^T` of every example's gradient by plain autograd, one example a time."""
    examples = [(batch[0][row : row + 1], batch[1][row : row + 1]) for row in range(len(batch[0]))]
    rows = []
    for gradients in loop_gradients(model, losses, examples):
        parts = [
            matrix_of(one.left) @ gradients[component.name].double() @ matrix_of(one.right).t()
            for component, one in zip(weights(model), compressors, strict=True)
        ]
        rows.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(rows).float()


@pytest.mark.parametrize("init", ["gaussian", "rademacher", "orthonormal"])
def test_naive_check_of_94_numbers_with_the_published_sides(init):
    """Sides 8x8 and 5x6 (out x in) are what the published rule makes of a rank of 64."""
    model, batch = model_of(10, 20, 5), batch_of(8, 10, 5)
    compressors = [
        parse_spec(f"logra:{sides},init={init}").build(component.name, component.shape, 42)
        for component, sides in zip(weights(model), ("8x8", "5x6"), strict=True)
    ]
    found = projected(model, batch, compressors)
    assert found.shape == (8, 94)
    torch.testing.assert_close(found, projected_one_by_one(model, batch, compressors), rtol=1e-4, atol=1e-5)


def test_naive_check_with_our_sides_keeps_the_whole_rank():
    model, batch = model_of(10, 20, 5), batch_of(8, 10, 5)
    spec = parse_spec("logra:64,min=4")
    compressors = [spec.build(component.name, component.shape, 42) for component in weights(model)]
    assert [(one.right.out_size, one.left.out_size) for one in compressors] == [(8, 8), (16, 4)]
    found = projected(model, batch, compressors)
    assert found.shape == (8, 128)
    torch.testing.assert_close(found, projected_one_by_one(model, batch, compressors), rtol=1e-4, atol=1e-5)


def test_non_interference_ten_steps_of_training_are_the_same_bit_for_bit():
    plain, watched = model_of(10, 20, 5), model_of(10, 20, 5)
    spec = parse_spec("logra:64,min=4")
    compressors = [spec.build(component.name, component.shape, 42) for component in weights(watched)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in (plain, watched)]
    for step in range(10):
        batch, found = batch_of(8, 10, 5, seed=step), []
        for model, optimizer in zip((plain, watched), optimizers, strict=True):
            if model is watched:
                assert float(projected(model, batch, compressors).norm()) > 0
            optimizer.zero_grad()
            loss = mean_loss(model, batch)
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        assert found[0] == found[1]
    for one, other in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "LayerNorm"])
def test_weight_and_bias_products_of_seven_examples_with_three(norm):
    """Every parameter of a 12-8-5 perceptron, the 1-D scales and shifts of its norm too."""
    model, train, held_out = model_of(12, 8, 5, norm=norm), batch_of(7, 12, 5, 0), batch_of(3, 12, 5, 1)
    components = select_components(model, ("all",)).components
    assert len(components) == (6 if norm else 4)
    queries = GradientSink(components)
    queries.begin(3, "cpu", torch.float32)
    with GradientPass(model, components, FunctionObjective(losses)) as gradient_pass:
        gradient_pass.run(held_out, queries)
        dots = DotSink(queries.gradients)
        dots.begin(7)
        gradient_pass.run(train, dots)
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    slopes = torch.autograd.grad(losses(model, held_out).sum(), list(parameters.values()))
    slope = dict(zip(parameters, slopes, strict=True))
    rows = loop_gradients(model, losses, [(train[0][row : row + 1], train[1][row : row + 1]) for row in range(7)])
    for number, component in enumerate(components):
        expected = torch.stack([(row[component.name] * slope[component.name]).sum() for row in rows])
        assert dots.scores[number].shape == (3, 7)
        torch.testing.assert_close(dots.scores[number].sum(0), expected, rtol=1e-4, atol=1e-5)


def test_gaussian_rows_are_well_conditioned():
    for seed in range(20):
        matrix = matrix_of(logra(768, 28, Stream(seed, "rows")))
        assert float(torch.linalg.cond(matrix)) < 2  # (1 + sqrt(28/768)) / (1 - sqrt(28/768)) is 1.5 on average


def test_rademacher_rows_are_signs_over_the_root_of_k():
    matrix = matrix_of(logra(40, 9, Stream(0, "rows"), init="rademacher"))
    torch.testing.assert_close(matrix.abs(), torch.full((9, 40), 1 / math.sqrt(9)).double(), rtol=1e-6, atol=0)
    assert 0.3 < float((matrix > 0).double().mean()) < 0.7


@pytest.mark.parametrize("spec", ["logra:4x4", "mask:8x8 | sjlt:16", "mask:64 | sjlt:16", "tensorsketch:16"])
def test_dattri_4_inputs_without_a_token_axis_are_compressed(spec):
    """A peer's LoGra and FactGraSS crashed on perceptrons: element 0 of a batch that was already unpacked."""
    model, batch = model_of(10, 20, 5), batch_of(8, 10, 5)
    compressors = [parse_spec(spec).build(component.name, component.shape, 0) for component in weights(model)]
    whole = projected(model, batch, compressors)
    assert bool((whole.norm(dim=1) > 0).all())
    for row in range(8):
        alone = projected(model, (batch[0][row : row + 1], batch[1][row : row + 1]), compressors)
        torch.testing.assert_close(alone[0], whole[row], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spec", ["factgrass-16", "grass-16", "SJLT-16", "grass_2-16"])
def test_dattri_5_a_sparse_sketch_is_sparse_wherever_it_runs(spec):
    """A peer's FactGraSS silently became a dense Gaussian on the CPU and on "cuda:0", and ignored its seed."""
    one, other = (parse_spec(spec).build("layer", (40, 30), seed, "cpu") for seed in (0, 1))
    assert isinstance(one.tail, Sjlt)
    assert isinstance(other.tail, Sjlt)
    assert ((matrix_of(one.tail) != 0).sum(0) == 1).all()
    assert not torch.equal(matrix_of(one.tail), matrix_of(other.tail))
    elsewhere = parse_spec(spec).build("layer", (40, 30), 0, "meta")
    assert isinstance(elsewhere.tail, Sjlt)


def test_grass_10_coordinates_beyond_32_bits_are_hashed_like_others():
    """A peer's kernel counted with 32 bits, which a batch of large gradients overflows."""
    sketch = Sjlt(8, 64, Stream(0, "wide"), 2)
    ids = torch.arange(2**31 - 2000, 2**31 + 2000)
    rows, values = sketch.nonzeros(torch.cat([ids, ids + 2**32]))
    assert int(rows.min()) >= 0
    assert int(rows.max()) < 64
    assert len(rows[:, 0].unique()) == len(rows[:, 1].unique()) == 32
    assert abs(float(values.sign().mean())) < 4.5 / len(values) ** 0.5
    assert not torch.equal(rows[: len(ids)], rows[len(ids) :])


@pytest.mark.parametrize("spec", ["sjlt:16", "sjlt:16,s=4", "mask:64 | sjlt:16", "tensorsketch:16", "fjlt:16"])
def test_grass_10_the_same_gradient_has_the_same_bytes_each_time(spec):
    """Atomic additions in a varying order made a peer's sketch differ from run to run."""
    model, batch = model_of(10, 20, 5), batch_of(8, 10, 5)
    compressors = [parse_spec(spec).build(component.name, component.shape, 0) for component in weights(model)]
    first = projected(model, batch, compressors)
    assert all(torch.equal(projected(model, batch, compressors), first) for _ in range(3))


@pytest.mark.parametrize("entries", range(1, 9))
def test_sjlt_skips_zeros_and_forgets_nothing_else(entries):
    """Coordinates that are zero add nothing: the image of the others alone is the image of all."""
    sketch = Sjlt(200, 16, Stream(0, "zeros"), entries)
    vector = torch.randn(3, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    vector[:, torch.arange(200) % 3 > 0] = 0.0
    ids = torch.arange(0, 200, 3).expand(3, -1)
    torch.testing.assert_close(sketch.apply(vector), sketch.apply_sparse(ids, vector[:, ::3]))
    assert float(sketch.apply(torch.zeros(2, 200)).abs().max()) == 0
