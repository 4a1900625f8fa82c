import math

import pytest
import torch

from tests.reference.sketch_error import errors
from vestige.evaluate import quality


def test_all_measures_are_those_of_a_plain_loop():
    torch.manual_seed(0)
    first, second = torch.randn(5, 30, dtype=torch.float64), torch.randn(8, 30, dtype=torch.float64)
    exact = first @ second.T
    estimate = exact + torch.randn(5, 8, dtype=torch.float64)
    found = quality(estimate, exact, first.norm(dim=1)[:, None] * second.norm(dim=1)[None])
    expected = errors(estimate.tolist(), exact.tolist(), first.norm(dim=1), second.norm(dim=1))
    assert tuple(found) == pytest.approx(expected, rel=1e-12)


def test_a_gradient_of_zero_has_no_cosine_and_no_rank():
    exact = torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 3.0]])
    lengths = torch.tensor([[0.0, 0.0, 0.0], [2.0, 2.0, 2.0]])
    found = quality(exact + torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]), exact, lengths)
    assert found.nrmse == pytest.approx(0.5)
    assert found.spearman == pytest.approx(1.0)


def test_products_that_never_vary_have_no_correlation():
    exact = torch.ones(2, 3)
    assert math.isnan(quality(exact, exact, exact).spearman)
