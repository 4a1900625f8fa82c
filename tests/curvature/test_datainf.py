"""DataInf against the average of explicit inverses in float64."""

import pytest
import torch

from vestige.curvature import DataInf, mean_eigenvalues
from vestige.errors import SpecError

from .conftest import measured, random_vectors, reference_gradients

PATTERNS = ("transformer.h.0.attn.c_proj.*", "transformer.ln_f.weight")


@pytest.mark.parametrize("budget", [1, 40, 4096])
def test_datainf_is_the_average_of_the_damped_inverses_for_any_batches(budget):
    given = measured("gpt2", *PATTERNS, budget=budget)
    asked = random_vectors(given)
    found = DataInf.with_damping(given, mean_eigenvalues(given), 0.1).precondition(asked)
    for number, gradients in enumerate(reference_gradients(given)):
        rows = torch.stack(gradients).flatten(1)
        damping = 0.1 * rows.square().sum(1).mean() / rows.shape[1]
        eye = torch.eye(rows.shape[1], dtype=torch.float64)
        inverses = torch.stack([torch.linalg.inv(torch.outer(row, row) + damping * eye) for row in rows])
        expected = asked[number] @ inverses.mean(0)
        assert torch.allclose(found[number], expected, rtol=1e-6, atol=1e-9 * float(expected.abs().max()))


def test_trap_damping_of_zero_is_refused_before_any_work():
    given = measured("gpt2", *PATTERNS)
    given.model.forward = lambda **_: pytest.fail("the model ran")
    with pytest.raises(SpecError, match="above zero"):
        DataInf.with_damping(given, [1.0], 0.0)


def test_a_component_without_gradients_does_no_harm():
    given = measured("gpt2", *PATTERNS)
    for mask in given.data.targets:
        mask[:] = False
    found = DataInf.with_damping(given, mean_eigenvalues(given), 0.1).precondition(random_vectors(given))
    assert all(bool(part.isfinite().all()) for part in found)
