import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.reference import unlearn as reference
from tests.unlearn.conftest import a_job
from vestige.errors import SpecError
from vestige.models import model_fingerprint
from vestige.unlearn import AscentRecipe, Retained, Scored, ascend, borrowed_weights

PULL, STEPS, RATE = 0.02, 6, 1e-7


def curved(model, data, vector):
    """The Hessian of the mean loss per token times a vector, by differentiating twice."""
    parameters = list(model.parameters())
    with sdpa_kernel(SDPBackend.MATH):  # The only attention that can be differentiated twice.
        loss = reference.set_loss(model, data, range(len(data)))
    slope = torch.autograd.grad(loss, parameters, create_graph=True)
    inner = sum((one * other).sum() for one, other in zip(slope, vector, strict=True))
    return torch.autograd.grad(inner, parameters, materialize_grads=True)


def test_a_retaining_ascent_follows_the_series_of_the_inverse_hessian(tmp_path):
    """Its steps are x <- x + g - pull H x, as LiSSA's, although no second derivative is taken."""
    job = a_job(tmp_path)
    data, tests = job.train.data, job.tests.sets[0]
    everything = np.arange(len(data))
    recipe = AscentRecipe(RATE, STEPS, len(tests.rows), "sgd", mirror=False, retain=len(data))
    with borrowed_weights(job.loaded) as weights:
        before = {name: each.detach().clone() for name, each in weights.parameters.items()}
        seen = []

        def look():
            seen.append([weights.parameters[name].detach() - start for name, start in before.items()])
            return np.zeros(1)

        ascend(weights, job.tests.data, tests.rows, look, recipe, Retained(data, everything, len(data), PULL))
        slope = reference.gradient(weights.model, job.tests.data, tests.rows)
        expected = [torch.zeros_like(part) for part in slope]
        for _ in range(STEPS):
            products = curved(weights.model, data, expected)
            expected = [x + g - PULL * h for x, g, h in zip(expected, slope, products, strict=True)]
    found = torch.cat([part.flatten() for part in seen[-1]]) / RATE
    right = torch.cat([part.flatten() for part in expected])
    plain = STEPS * torch.cat([part.flatten() for part in slope])
    assert (found - right).norm() < 1e-4 * right.norm()
    # The curvature matters here: without it the way would be another one.
    assert (right - plain).norm() > 0.01 * plain.norm()


def test_the_pull_is_a_quarter_of_the_inverse_of_the_largest_curvature(tmp_path):
    job = a_job(tmp_path)
    recipe = AscentRecipe(RATE, STEPS, 4, "sgd", retain=len(job.train.data))
    with borrowed_weights(job.loaded) as weights:
        found = Retained.measured(weights, job.train.data, recipe)
        vector = [torch.randn_like(part) for part in weights.parameters.values()]
        for _ in range(40):
            length = sum(float(part.square().sum()) for part in vector) ** 0.5
            vector = curved(weights.model, job.train.data, [part / length for part in vector])
        largest = sum(float(part.square().sum()) for part in vector) ** 0.5
    # Eight steps of the power iteration, which approaches the largest from below.
    assert 0.5 * largest < 1 / (4 * found.pull) < 1.05 * largest


@pytest.mark.parametrize("direction", ["untrac", "inverse"])
def test_a_retaining_run_leaves_the_weights_and_says_what_it_did(tmp_path, direction):
    job = a_job(tmp_path, direction=direction, learning_rate=1e-4, optimizer="sgd", retain=5, steps=4)
    scored, again = Scored(job), Scored(job)
    assert model_fingerprint(job.loaded.model) == job.loaded.fingerprint
    np.testing.assert_array_equal(scored.scores, again.scores)
    other = Scored(a_job(tmp_path, direction=direction, learning_rate=1e-4, optimizer="sgd", steps=4))
    assert np.isfinite(scored.scores).all()
    assert not np.array_equal(scored.scores, other.scores)


def test_optimizers_that_rescale_are_refused(tmp_path):
    with pytest.raises(SpecError, match="--optimizer sgd"):
        a_job(tmp_path, retain=5)
