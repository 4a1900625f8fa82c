import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.reference import unlearn as reference
from tests.untrac.conftest import a_job, query_data, training_data
from vestige.errors import NonFinite, SpecError
from vestige.methods import (
    RETAINED_STEPS,
    AscentRecipe,
    Retained,
    Unlearning,
    UntracJob,
    Weights,
    ascend,
    borrow_weights,
)
from vestige.models import model_fingerprint

PULL, STEPS, RATE = 0.02, 6, 1e-7


def curved(model, data, vector):
    """The Hessian of the mean loss per token times a vector, by differentiating twice."""
    parameters = list(model.parameters())
    with sdpa_kernel(SDPBackend.MATH):  # The only attention that can be differentiated twice.
        loss = reference.set_loss(model, data, range(len(data)))
    slope = torch.autograd.grad(loss, parameters, create_graph=True)
    inner = sum((one * other).sum() for one, other in zip(slope, vector, strict=True))
    return torch.autograd.grad(inner, parameters, materialize_grads=True)


@pytest.mark.slow
@pytest.mark.parametrize("accelerate", [False, True])
def test_a_retaining_ascent_follows_the_series_of_the_inverse_hessian(tmp_path, accelerate):
    """Steps of LiSSA, x <- y + g - pull H y, y being x or ahead of it, although no second derivative is taken."""
    job = a_job(tmp_path)
    data, tests = job.train.data, job.tests.sets[0]
    everything = np.arange(len(data))
    recipe = AscentRecipe(RATE, STEPS, len(tests.rows), "sgd", mirror=False, retain=len(data), accelerate=accelerate)
    with borrow_weights(job.loaded) as weights:
        before = {name: each.detach().clone() for name, each in weights.parameters.items()}
        seen = []

        def look():
            seen.append([weights.parameters[name].detach() - start for name, start in before.items()])
            return np.zeros(1)

        ascend(weights, job.tests.data, tests.rows, look, recipe, Retained(data, everything, len(data), PULL))
        slope = reference.gradient(weights.model, job.tests.data, tests.rows)
        expected = ahead = [torch.zeros_like(part) for part in slope]
        for step in range(1, STEPS + 1):
            last, products = expected, curved(weights.model, data, ahead)
            expected = [y + g - PULL * h for y, g, h in zip(ahead, slope, products, strict=True)]
            share = step / (step + 3) if accelerate else 0.0
            ahead = [x + share * (x - before) for x, before in zip(expected, last, strict=True)]
    found = torch.cat([part.flatten() for part in seen[-1]]) / RATE
    right = torch.cat([part.flatten() for part in expected])
    uphill = torch.cat([part.flatten() for part in slope])
    assert (found - right).norm() < 1e-4 * right.norm()
    # The curvature matters here: without it the way would be another one.
    assert torch.cosine_similarity(right, uphill, dim=0) < 0.9999


@pytest.mark.slow
def test_the_pull_is_a_quarter_of_the_inverse_of_the_largest_curvature(tmp_path):
    job = a_job(tmp_path)
    recipe = AscentRecipe(RATE, STEPS, 4, "sgd", retain=len(job.train.data))
    with borrow_weights(job.loaded) as weights:
        found = Retained.measure(weights, job.train.data, recipe)
        vector = [torch.randn_like(part) for part in weights.parameters.values()]
        for _ in range(40):
            length = sum(float(part.square().sum()) for part in vector) ** 0.5
            vector = curved(weights.model, job.train.data, [part / length for part in vector])
        largest = sum(float(part.square().sum()) for part in vector) ** 0.5
    # Eight steps of the power iteration, which approaches the largest from below.
    assert 0.5 * largest < 1 / (4 * found.pull) < 1.05 * largest


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["untrac", "inverse"])
def test_a_retaining_run_leaves_the_weights_and_says_what_it_did(tmp_path, direction):
    job = a_job(tmp_path, direction=direction, learning_rate=1e-4, optimizer="sgd", retain=5, steps=4)
    scored, again = Unlearning(job), Unlearning(job)
    assert max(each.error for each in scored.done.identities) < 0.02
    assert model_fingerprint(job.loaded.model) == job.loaded.fingerprint
    np.testing.assert_array_equal(scored.scores, again.scores)
    other = Unlearning(a_job(tmp_path, direction=direction, learning_rate=1e-4, optimizer="sgd", steps=4))
    assert np.isfinite(scored.scores).all()
    assert not np.array_equal(scored.scores, other.scores)


def test_optimizers_that_rescale_are_refused(tmp_path):
    with pytest.raises(SpecError, match="--optimizer sgd"):
        a_job(tmp_path, retain=5)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"retain": 5, "momentum": 0.9}, "Drop --momentum"),
        ({"retain": 5, "direction": "untrac"}, "--direction inverse"),
        ({}, "with --retain"),
    ],
)
def test_only_ascents_to_a_summit_are_accelerated(tmp_path, wrong, told):
    with pytest.raises(SpecError, match=told):
        a_job(tmp_path, optimizer="sgd", accelerate=True, **wrong)
    accelerated = a_job(tmp_path, optimizer="sgd", accelerate=True, retain=5)
    assert accelerated.recipe(1e-4).accelerate
    assert not a_job(tmp_path, optimizer="sgd", retain=5).recipe(1e-4).accelerate


@pytest.mark.slow
def test_an_accelerated_ascent_that_runs_away_says_what_to_leave_out(tmp_path, monkeypatch):
    monkeypatch.setattr(UntracJob, "curvature_share", lambda *_: float("inf"))
    with pytest.raises(NonFinite, match="Leave --accelerate out"):
        Unlearning(a_job(tmp_path, optimizer="sgd", accelerate=True, retain=5, steps=2, learning_rate=None))


class Quadratic(torch.nn.Module):
    """Weights of a loss that the tests write down themselves."""

    def __init__(self, size):
        super().__init__()
        self.x = torch.nn.Parameter(torch.ones(size, dtype=torch.float64))


@pytest.fixture
def quadratic():
    """A climbed loss <slope, x>, a training loss of curvature H, and gradients of both in place of a model's."""
    random = np.random.default_rng(0)
    basis = torch.from_numpy(np.linalg.qr(random.standard_normal((30, 30)))[0])
    curvature = basis * torch.logspace(-2, 0, 30, dtype=torch.float64) @ basis.T
    slope, bias = (torch.from_numpy(random.standard_normal(30)) for _ in range(2))
    climbed, train = query_data(), training_data()

    class QuadraticWeights(Weights):
        def backward(self, data, rows, reduction, token_budget):
            x = self.parameters["x"]
            x.grad = slope.clone() if data is climbed else bias + curvature @ x.detach()
            return 1.0

    return QuadraticWeights(model := Quadratic(30), dict(model.named_parameters())), climbed, train, curvature, slope


def test_an_ascent_of_default_length_is_as_close_to_the_inverse_curvature_as_nesterov_proved(quadratic):
    """Without noise the error in the norm of H is at most 2 |H^-1 g| / (sqrt(pull) (n + 1)), whatever H."""
    weights, climbed, train, curvature, slope = quadratic
    start = weights.copy()["x"]
    recipe = AscentRecipe(1e-3, RETAINED_STEPS, 6, "sgd", mirror=False, retain=4, accelerate=True)
    held, seen = Retained.measure(weights, train, recipe), []

    def look():
        seen.append((weights.parameters["x"].detach() - start) * held.pull / recipe.learning_rate)
        return np.zeros(1)

    ascend(weights, climbed, np.arange(6), look, recipe, held)
    right = torch.linalg.solve(curvature, slope)

    def missed(found):
        return float((found - right) @ curvature @ (found - right))

    plain = torch.zeros_like(right)
    for _ in range(RETAINED_STEPS):
        plain = plain + held.pull * (slope - curvature @ plain)
    assert missed(seen[-1]) <= 4 * float(right @ right) / (held.pull * (RETAINED_STEPS + 1) ** 2)
    assert missed(seen[-1]) < 0.5 * missed(plain)
    steep = torch.linalg.eigh(curvature).eigenvectors[:, -7:]
    assert (steep.T @ (seen[-1] - right)).norm() < 0.1 * (steep.T @ right).norm()
    assert torch.equal(weights.parameters["x"].detach(), start)
