import numpy as np
import pytest
import torch

from tests.architectures import build, sequences
from vestige.compress import parse_spec
from vestige.errors import NonFinite, UserError
from vestige.evaluate import Rows, Samples, Source, exact_products, project_products, sketch_products
from vestige.gradients import CausalLoss, GradientPass
from vestige.models import select_components

REFERENCES, COUNT = 3, 7


def samples() -> Samples:
    drawn = sequences(COUNT)
    reference = tuple(Rows(np.array([row]), drawn.batch([row])) for row in range(REFERENCES))
    # Out of order, as a plan by length has them.
    test = tuple(Rows(np.array(rows) - REFERENCES, drawn.batch(rows)) for rows in ([5, 3], [6, 4]))
    return Samples(reference, test)


def dense(model: torch.nn.Module) -> torch.Tensor:
    """Gradients `[example, parameter]` of the summed losses, one plain backward pass each."""
    drawn, rows = sequences(COUNT), []
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    for row in range(COUNT):
        model.zero_grad()
        ids, mask = drawn.ids[row], drawn.targets[row]
        predicted = model(input_ids=ids[None]).logits[0, :-1].log_softmax(1)
        losses = -predicted[torch.arange(len(ids) - 1), ids[1:]]
        losses[mask[1:]].sum().backward()
        rows.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    return torch.stack(rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("shares", [1, 3])
def test_exact_products_are_those_of_plain_backward_passes_however_little_memory_there_is(name, shares):
    model = build(name)
    components = select_components(model, ("all",)).components
    gradients = dense(model)
    with GradientPass(model, components, CausalLoss()) as gradient_pass:
        source = Source.of(gradient_pass, components, model)
        memory = source.gradient_bytes * (1 + -(-REFERENCES // shares))
        passed = []
        found = exact_products(source, samples(), memory, passed.append).sum_components()
    expected = gradients[:REFERENCES] @ gradients[REFERENCES:].T
    # The products are summed in float64 up to the order of the terms.
    torch.testing.assert_close(found.values[0], expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
    norms = gradients.norm(dim=1)
    torch.testing.assert_close(found.lengths[0], norms[:REFERENCES, None] * norms[None, REFERENCES:])
    assert sum(passed) == REFERENCES + shares * (COUNT - REFERENCES)


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec", ["logra:3x4", "tensorsketch:16", "mask:6x6 | sjlt:16", "mask:40 | sjlt:16", "gauss:16"]
)
def test_streaming_compression_equals_the_projection_of_exact_gradients(spec):
    model = build("gpt2", torch.float32)
    components = select_components(model, ("all",)).components
    sketches = [[parse_spec(spec).build(one.name, one.shape, seed) for one in components] for seed in (0, 1)]
    with GradientPass(model, components, CausalLoss()) as gradient_pass:
        source = Source.of(gradient_pass, components, model)
        streamed = sketch_products(source, samples(), sketches)
        projected = [project_products(source, samples(), compressors) for compressors in sketches]
    for one, other in zip(streamed, projected, strict=True):
        size = float(other.values.abs().max())
        torch.testing.assert_close(one.products.values, other.values, rtol=1e-4, atol=1e-5 * size)
        assert one.seconds > 0
    assert not torch.equal(streamed[0].products.values, streamed[1].products.values)


def test_no_compression_gives_the_exact_products():
    model = build("llama", torch.float32)
    components = select_components(model).components
    with GradientPass(model, components, CausalLoss()) as gradient_pass:
        source = Source.of(gradient_pass, components, model)
        exact = exact_products(source, samples(), 2**30)
        whole = [parse_spec("none").build(one.name, one.shape, 0) for one in components]
        (found,) = sketch_products(source, samples(), [whole])
    torch.testing.assert_close(found.products.values, exact.values, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.products.lengths, exact.lengths, rtol=1e-4, atol=1e-5)


def test_gradients_that_do_not_fit_are_refused_with_advice():
    model = build("gpt2")
    components = select_components(model).components
    with GradientPass(model, components, CausalLoss()) as gradient_pass:
        source = Source.of(gradient_pass, components, model)
        with pytest.raises(UserError, match="fewer --components"):
            exact_products(source, samples(), 2 * source.gradient_bytes - 1)


def test_a_broken_weight_is_reported():
    model = build("gpt2")
    next(model.parameters()).data[0, 0] = float("nan")
    components = select_components(model).components
    drawn = samples()
    drawn.test[0].batch.input_ids[0, 0] = 0
    with GradientPass(model, components, CausalLoss()) as gradient_pass, pytest.raises(NonFinite, match="doctor"):
        exact_products(Source.of(gradient_pass, components, model), drawn, 2**30)
