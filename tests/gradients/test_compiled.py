"""What of a model may be compiled: norms and activations, between the maps that gradients are taken from."""

import copy

import pytest
import torch

from tests.architectures import build
from vestige.data import Batch
from vestige.gradients import CausalLoss, GradientPass, GradientSink
from vestige.models import load_model, select_components


def gradients_of(model: torch.nn.Module) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Losses and gradients of three batches' last, when nothing is watched any more."""
    ids = torch.randint(3, 30, (3, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[1, 5:], labels[2, :4] = -100, -100
    batch, components = Batch(torch.arange(3), ids, labels), select_components(model, ("default",)).components
    sink = GradientSink(components)
    with GradientPass(model, components, CausalLoss()) as run:
        for _ in range(3):
            sink.begin(3, "cpu")
            losses = run.run(batch, sink)
    return losses, sink.gradients


@pytest.mark.slow
def test_compiled_norms_and_activations_give_the_same_gradients():
    model = load_model(build("llama", torch.float32)).model
    compiled = copy.deepcopy(model)
    parts = [part for path, part in compiled.named_modules() if path.endswith(("norm", "act_fn"))]
    assert len(parts) > 4
    for part in parts:
        part.compile(backend="aot_eager")
    expected, found = gradients_of(model), gradients_of(load_model(compiled).model)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=1e-6)
    for one, other in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6 * float(other.abs().max()) + 1e-8)
