"""Influence functions are one small step of UnTrac by Newton's rule."""

import numpy as np
import pytest
import torch

from tests.reference import curvature as dense, unlearn as reference
from tests.untrac.conftest import a_job
from vestige.methods import AscentRecipe, Unlearning

LAYER = "transformer.h.0.attn.c_proj"
NAMES = [f"{LAYER}.weight", f"{LAYER}.bias"]
ETA, DAMPING = 1e-6, 0.1


class NewtonStep(torch.optim.Optimizer):
    """Adds the rate times (C + d I)^-1 of the gradient to the weights that C is about, and leaves the others."""

    def __init__(self, weights, rate, inverse):
        super().__init__(weights, {"lr": rate})
        self._inverse = inverse

    def step(self):
        weights = self.param_groups[0]["params"]
        moved = self._inverse @ torch.cat([each.grad.flatten() for each in weights])
        with torch.no_grad():
            for each, part in zip(weights, moved.split([one.numel() for one in weights]), strict=True):
                each.add_(part.view(each.shape), alpha=self.param_groups[0]["lr"])


@pytest.mark.parametrize("direction", ["untrac", "inverse"])
def test_one_small_newton_step_is_the_influence_function(tmp_path, monkeypatch, direction):
    """B-R3: both directions over the rate are <(C + d I)^-1 g_test, g_source>, C the explicit Gauss-Newton matrix."""
    job = a_job(tmp_path, direction=direction, learning_rate=ETA, steps=1, batch_size=100, stop="last")
    model = job.loaded.model
    places = [number for number, (name, _) in enumerate(model.named_parameters()) if name in NAMES]
    matrix = dense.gauss_newton(model, NAMES, job.train.data)
    inverse = torch.linalg.inv(matrix + DAMPING * torch.eye(len(matrix), dtype=matrix.dtype))

    def slope(data, rows):
        found = reference.gradient(model, data, rows)
        return torch.cat([found[place].flatten() for place in places]).detach()

    tests, sources = (
        torch.stack([slope(side.data, each.rows) for each in side.sets]) for side in (job.tests, job.train)
    )
    expected = (tests @ inverse @ sources.T).numpy()
    plain, optimizer = (tests @ sources.T).numpy(), AscentRecipe.make_optimizer

    def newton(recipe, parameters):
        chosen = list(parameters)
        if recipe.optimizer == "sgd":  # The self-test's own step.
            return optimizer(recipe, chosen)
        return NewtonStep([chosen[place] for place in places], recipe.learning_rate, inverse)

    monkeypatch.setattr(AscentRecipe, "make_optimizer", newton)
    found = Unlearning(job).scores / ETA
    assert np.abs(found - expected).max() < 1e-3 * np.abs(expected).max()
    # Not the inner products of the gradients: the matrix matters here.
    assert np.corrcoef(found.ravel(), plain.ravel())[0, 1] < 0.99
