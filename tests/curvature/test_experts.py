"""Curvature of experts, which are slices of one parameter: each against explicit matrices of its own gradients."""

import pytest
import torch

from tests.architectures import build
from tests.reference import curvature as dense
from vestige.curvature import CurvatureData, ekfac_of, kfac_of
from vestige.models import select_components

from .conftest import random_vectors, tokenized

STACK = "model.layers.0.mlp.experts.gate_up_proj"


def gradients_of_stack(data) -> torch.Tensor:
    """Plain autograd, one example at a time: [example, expert, out, in]."""
    model, found = build("mixtral"), []
    stack = model.get_parameter(STACK)
    for ids, targets in zip(data.input_ids, data.targets, strict=True):
        log_probabilities = torch.log_softmax(model(torch.as_tensor(ids).long()[None]).logits[0], -1)
        loss = sum(-log_probabilities[t, ids[t + 1]] for t in dense.predicting(torch.as_tensor(targets)))
        found.append(torch.autograd.grad(loss, stack)[0])
    return torch.stack(found)


@pytest.fixture
def given() -> CurvatureData:
    model = build("mixtral")
    components = select_components(model, (STACK,)).components
    return CurvatureData(model, components, tokenized(6, 1, "t"), 4096, labels="data")


def test_ekfac_of_every_expert_is_measured_on_its_own_gradients(given):
    factors = kfac_of(given).factors
    vectors, found = random_vectors(given), ekfac_of(given).precondition(random_vectors(given), 0.1)
    gradients = gradients_of_stack(given.data)
    used = 0
    for number, component in enumerate(given.components):
        assert component.name == f"{STACK}[{number}]"
        own = list(gradients[:, number])
        if not any(bool(one.any()) for one in own):
            continue
        used += 1
        matrix = dense.eigen_corrected(factors[number].left, factors[number].right, own)
        expected = torch.linalg.solve(dense.damped(matrix, 0.1), vectors[number].T).T
        assert torch.allclose(found[number], expected, rtol=1e-6, atol=1e-8 * float(expected.abs().max()))
    assert used > 1, "several experts must have been used for this to be a test"
