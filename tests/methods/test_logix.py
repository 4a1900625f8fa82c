"""LogIX's influence: a random LoRA and a Fisher matrix for each layer, damped by a tenth of its mean eigenvalue."""

import pytest
import torch

from tests.methods.conftest import all_scores
from tests.methods.test_influence_options import indexed_job
from tests.reference.gradients import example_gradients
from vestige.compress import parse_spec
from vestige.methods import Influence

SPEC = "logra:4x4"


@pytest.mark.slow
def test_influence_on_logra_at_a_tenth_is_that_of_logix_from_the_weights_to_the_scores(tmp_path):
    """By `torch.func` in float64, one example of uneven length and masked labels after another."""
    job = indexed_job(tmp_path, SPEC, 0.1)
    assert job.loaded is not None
    found = all_scores(Influence(), job)
    model = job.loaded.model.double()
    rows = [
        example_gradients(model, torch.as_tensor(ids), torch.as_tensor(targets))
        for ids, targets in zip(job.train.input_ids, job.train.targets, strict=True)
    ]
    expected = torch.zeros(30, 30, dtype=torch.float64)
    for part in job.components:
        maps = parse_spec(SPEC).build(part.name, part.shape, 0)
        down, up = (
            side.columns(torch.arange(size)).double().T
            for side, size in zip((maps.left, maps.right), part.shape, strict=True)
        )
        logged = torch.stack([(down @ row[part.name].reshape(part.shape) @ up.T).flatten() for row in rows])
        fisher = logged.T @ logged / len(rows)
        fisher += 0.1 * float(torch.linalg.eigvalsh(fisher).mean()) * torch.eye(len(fisher), dtype=torch.float64)
        expected += logged @ torch.linalg.solve(fisher, logged.T)
    # The rows of the index are float32.
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
