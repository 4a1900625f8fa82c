"""Solvers on explicit matrices, and products against explicit curvature, in float64."""

import dataclasses

import pytest
import torch

from tests.architectures import build
from tests.reference import curvature as dense
from vestige.curvature import CurvatureProduct, arnoldi, conjugate_gradient, largest_eigenvalue, lissa
from vestige.errors import NonFinite

from .conftest import canonical, measured, name_of


@pytest.fixture
def matrix() -> torch.Tensor:
    """Positive semi-definite, eigenvalues from 1 down to 2^-19, and zeros."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.linalg.qr(torch.randn(24, 24, generator=generator, dtype=torch.float64)).Q
    values = torch.cat([2.0 ** -torch.arange(20, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)])
    return vectors @ torch.diag(values) @ vectors.T


@pytest.fixture
def asked() -> torch.Tensor:
    return torch.randn(3, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * torch.tensor(
        [[1.0], [1e-6], [0.0]]
    )


def solution(matrix, asked, damping) -> torch.Tensor:
    return torch.linalg.solve(matrix + damping * torch.eye(24, dtype=torch.float64), asked.T).T


def test_conjugate_gradients_solve_every_vector_whatever_its_length(matrix, asked):
    found = conjugate_gradient(lambda v: v @ matrix, asked, 1e-3, steps=60, tolerance=1e-9)
    assert torch.allclose(found.vectors, solution(matrix, asked, 1e-3), rtol=1e-7, atol=1e-14)
    assert found.steps < 60
    assert float(found.residuals.max()) <= 1e-9


def test_conjugate_gradients_say_how_far_they_came(matrix, asked):
    found = conjugate_gradient(lambda v: v @ matrix, asked[:1], 1e-3, steps=3, tolerance=1e-9)
    residual = asked[:1] - found.vectors @ (matrix + 1e-3 * torch.eye(24, dtype=torch.float64))
    assert found.steps == 3
    assert torch.allclose(found.residuals, residual.norm(dim=1) / asked[:1].norm(dim=1))


def test_conjugate_gradients_refuse_negative_curvature(matrix, asked):
    with pytest.raises(NonFinite, match="Gauss-Newton"):
        conjugate_gradient(lambda v: v @ (matrix - 0.5 * torch.eye(24)), asked[:1], 1e-3, steps=60, tolerance=1e-9)


def test_lissa_converges_to_the_inverse(matrix, asked):
    found = lissa(lambda _, v: v @ matrix, asked, 0.05, scale=1.05, depth=500)
    assert torch.allclose(found, solution(matrix, asked, 0.05), rtol=1e-7, atol=1e-14)


def test_lissa_reaches_the_stated_share_after_each_step(matrix, asked):
    values, vectors = torch.linalg.eigh(matrix)
    found = lissa(lambda _, v: v @ matrix, asked, 0.05, scale=1.5, depth=7) @ vectors
    share = 1 - (1 - (values + 0.05) / 1.5) ** 8
    assert torch.allclose(found, solution(matrix, asked, 0.05) @ vectors * share)


def test_lissa_says_when_its_scale_is_too_small(matrix, asked):
    with pytest.raises(NonFinite, match="diverges"):
        lissa(lambda _, v: v @ matrix, asked, 0.05, scale=0.4, depth=500)


def test_power_iteration_finds_the_largest_eigenvalue(matrix, asked):
    assert largest_eigenvalue(lambda v: v @ matrix, asked[:1], steps=50) == pytest.approx(1.0)
    assert largest_eigenvalue(lambda v: -v @ matrix, asked[:1], steps=50) == pytest.approx(1.0)
    assert largest_eigenvalue(torch.zeros_like, asked[:1], steps=5) == 0.0


def test_arnoldi_finds_the_dominant_eigenpairs(matrix, asked):
    indefinite = matrix - 0.3 * torch.eye(24, dtype=torch.float64)
    pairs = arnoldi(lambda v: v @ indefinite, asked[0], steps=24, rank=3)
    values = torch.linalg.eigvalsh(indefinite)
    expected = values[values.abs().argsort(descending=True)][:1]
    assert torch.allclose(pairs.values[:1], expected)
    assert torch.allclose(pairs.vectors @ pairs.vectors.T, torch.eye(3, dtype=torch.float64), atol=1e-10)
    assert torch.allclose(pairs.vectors[:1] @ indefinite, pairs.values[:1, None] * pairs.vectors[:1], atol=1e-8)


def test_arnoldi_with_all_eigenvectors_is_the_inverse(matrix, asked):
    regular = matrix + torch.diag(torch.linspace(1, 2, 24, dtype=torch.float64))
    pairs = arnoldi(lambda v: v @ regular, asked[0], steps=24, rank=24)
    assert torch.allclose(pairs.precondition(asked, 0.1), solution(regular, asked, 0.1), atol=1e-9)


def test_arnoldi_stops_when_its_space_is_exhausted(matrix):
    low_rank = torch.diag(torch.tensor([3.0, 2.0] + [0.0] * 22, dtype=torch.float64))
    pairs = arnoldi(lambda v: v @ low_rank, torch.ones(24, dtype=torch.float64), steps=24, rank=10)
    assert len(pairs.values) <= 4
    assert torch.allclose(pairs.values[:2], torch.tensor([3.0, 2.0], dtype=torch.float64))


PARTS = [("gpt2", "transformer.h.0.attn.c_proj.*"), ("llama", "model.layers.0.self_attn.v_proj.weight")]


def explicit(given, matrix_of) -> torch.Tensor:
    """The reference matrix with its lines and columns in the canonical order of the components."""
    names = [part.name for part in given.components]
    matrix = matrix_of(build(name_of(given)), names, given.data)
    order, start = [], 0
    for part in given.components:
        parameter = given.model.get_parameter(part.name)
        order.append(canonical(part, torch.arange(start, start + part.size).view(parameter.shape)).flatten())
        start += part.size
    place = torch.cat(order)
    return matrix[place][:, place]


@pytest.mark.parametrize(("name", "pattern"), PARTS)
@pytest.mark.parametrize(("kind", "reference"), [("gauss-newton", dense.gauss_newton), ("hessian", dense.hessian)])
def test_products_are_those_of_the_explicit_matrix_and_know_no_batches(name, pattern, kind, reference):
    given = measured(name, pattern, train=3)
    matrix = explicit(given, reference)
    vectors = torch.randn(2, len(matrix), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for budget in (1, 4096):
        product = CurvatureProduct(given.model, given.components, given.data, budget, kind=kind)
        # Llama's norms compute in float32 whatever the model's numbers; GPT-2 has none of that.
        tolerance = 1e-5 if name == "llama" else 1e-10
        assert torch.allclose(product(vectors), vectors @ matrix, rtol=tolerance, atol=tolerance * float(matrix.norm()))


def test_products_of_a_mean_loss_weigh_every_example_alike():
    given = measured("llama", "model.layers.0.self_attn.v_proj.weight", train=1)
    vectors = torch.randn(1, given.components[0].size, dtype=torch.float64)
    product = CurvatureProduct(given.model, given.components, given.data, 4096)
    targets = int(given.data.targets[0].sum())
    assert torch.allclose(dataclasses.replace(product, reduction="mean")(vectors), product(vectors) / targets)


@pytest.mark.slow
def test_trap_inverses_of_batches_are_not_summed():
    """A peer sums `(C_batch + d)^-1 v` over batches: the batch size changes the scale 17 times, and the ranking."""
    given = measured("gpt2", "transformer.h.0.attn.c_proj.bias", train=6)
    vectors = torch.randn(1, given.components[0].size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def solved(data, budget):
        product = CurvatureProduct(given.model, given.components, data, budget)
        return conjugate_gradient(product, vectors, 1e-2, steps=30, tolerance=1e-6).vectors

    whole = solved(given.data, 4096)
    assert torch.allclose(solved(given.data, 1), whole, rtol=1e-5, atol=1e-6 * float(whole.abs().max()))
    summed = sum(solved(given.data.subset([row]), 4096) for row in range(6))
    assert float((summed - whole).norm() / whole.norm()) > 1
