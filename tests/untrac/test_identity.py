import numpy as np
import pytest
import torch

from tests.architectures import CAUSAL
from tests.reference import unlearn as reference
from tests.untrac.conftest import a_job
from vestige.errors import ModelError
from vestige.methods import AscentRecipe, Unlearning, Weights, borrow_weights, first_order_identity

ETA = 1e-6


def one_step(tmp_path, direction):
    job = a_job(
        tmp_path / direction,
        direction=direction,
        optimizer="sgd",
        learning_rate=ETA,
        steps=1,
        batch_size=100,
        stop="last",
    )
    return job, Unlearning(job).scores / ETA


def test_one_small_full_batch_step_is_graddot_and_the_two_directions_agree(tmp_path):
    """B-R3: (UnTrac) / eta = GradDot = (Inv) / eta, within 1%."""
    job, untrac = one_step(tmp_path, "untrac")
    _, inverse = one_step(tmp_path, "inverse")
    model = job.loaded.model
    slopes = [
        [reference.gradient(model, side.data, each.rows) for each in side.sets] for side in (job.tests, job.train)
    ]
    products = np.array(
        [[float(sum((a * b).sum() for a, b in zip(q, z, strict=True))) for z in slopes[1]] for q in slopes[0]]
    )
    size = np.abs(products).max()
    assert np.abs(untrac - products).max() < 0.01 * size
    assert np.abs(inverse - products).max() < 0.01 * size


def test_the_score_of_a_helpful_source_is_positive(tmp_path):
    """Unlearning the very text of the test set raises its loss."""
    job = a_job(tmp_path)
    same = a_job(tmp_path / "same", train=job.train.data, tests=job.train.data, direction="untrac", learning_rate=1e-4)
    scores = Unlearning(same).scores
    assert bool((np.diag(scores) > 0).all())


@pytest.mark.parametrize("architecture", CAUSAL)
def test_the_identity_holds_for_every_model(tmp_path, architecture):
    job = a_job(tmp_path, architecture=architecture, dtype=torch.float32)
    with borrow_weights(job.loaded) as weights:
        found = self_tested(weights, job)
    assert found.error < 0.02, found


def self_tested(weights, job):
    sides = [(side.data, side.sets[0].rows) for side in (job.ascended, job.measured)]
    return first_order_identity(weights, sides[0], sides[1], job.recipe(1e-3))


def test_trap_tnlp_negated_loss_with_added_gradient_is_flagged(tmp_path, monkeypatch):
    """The reproduction back-propagates the negated loss and adds its gradient: that is descent."""
    right = Weights.backward

    def literal(weights, *given):
        loss = right(weights, *given)
        for parameter in weights.parameters.values():
            if parameter.grad is not None:
                parameter.grad.neg_()
        return loss

    monkeypatch.setattr(Weights, "backward", literal)
    job = a_job(tmp_path)
    with borrow_weights(job.loaded) as weights, pytest.raises(ModelError, match="down, not up"):
        self_tested(weights, job)
    with pytest.raises(ModelError, match="turn the sign of every score"):
        Unlearning(job)


def test_trap_tnlp_a_descending_optimizer_is_flagged(tmp_path, monkeypatch):
    def descending(recipe, parameters):
        return torch.optim.SGD(list(parameters), lr=recipe.learning_rate)

    monkeypatch.setattr(AscentRecipe, "make_optimizer", descending)
    with pytest.raises(ModelError, match="down, not up"):
        Unlearning(a_job(tmp_path))


def test_weights_that_round_small_steps_away_are_flagged(tmp_path, monkeypatch):
    def stuck(recipe, parameters):
        return torch.optim.SGD(list(parameters), lr=0.0)

    monkeypatch.setattr(AscentRecipe, "make_optimizer", stuck)
    with pytest.raises(ModelError, match="--precision float32"):
        Unlearning(a_job(tmp_path))
