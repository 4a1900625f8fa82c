"""EK-FAC refined with products of the whole Gauss-Newton matrix: against explicit matrices in float64."""

import pytest
import torch

from tests.architectures import build
from tests.methods.conftest import all_scores, model_job
from tests.methods.test_curvature_methods import gradients, small_job
from tests.reference import curvature as dense
from vestige.curvature import conjugate_gradient, neumann
from vestige.errors import SpecError
from vestige.methods import Ekfac, get_method

LAYER = "transformer.h.0.attn.c_proj"
NAMES = [f"{LAYER}.weight", f"{LAYER}.bias"]


def explicit(job) -> torch.Tensor:
    """Gauss-Newton matrix plus what EK-FAC adds to the diagonal, lines as in `gradients`."""
    rows = gradients(job.train)
    left, right, _ = dense.kronecker(build("gpt2"), LAYER, job.train)
    ekfac = dense.eigen_corrected(left, right, [row.view(16, 17) for row in rows])
    matrix = dense.gauss_newton(build("gpt2"), NAMES, job.train)
    place = torch.cat([torch.arange(256).view(16, 16).T, torch.arange(256, 272)[:, None]], dim=1).flatten()
    return matrix[place][:, place] + job.settings.damping * ekfac.trace() / 272 * torch.eye(272, dtype=torch.float64)


@pytest.mark.slow
def test_refined_scores_are_those_of_the_explicit_matrix_and_ekfacs_own_are_not():
    job = small_job()
    expected = gradients(job.queries) @ torch.linalg.solve(explicit(job), gradients(job.train).T)
    found = all_scores(Ekfac(labels="data", refine="cg:60"), job)
    assert torch.allclose(found, expected, rtol=5e-3, atol=2e-3 * float(expected.abs().max()))
    alone = all_scores(Ekfac(labels="data"), job)
    assert not torch.allclose(alone, expected, rtol=5e-3, atol=2e-3 * float(expected.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("refine", ["cg:3", "neumann:2"])
def test_the_run_says_the_residual_before_and_after(refine):
    job = small_job(damping=1.0)
    method = Ekfac(labels="data", refine=refine)
    all_scores(method, job)
    (check,) = method.checks(job)
    whole = gradients(job.queries)
    prepared = method.prepare(job).vectors
    solved = torch.cat([prepared[0].view(-1, 16, 16), prepared[1][:, :, None]], dim=2).flatten(1).double()
    left = (whole - solved @ explicit(job)).norm(dim=1) / whole.norm(dim=1)
    assert check.value == pytest.approx(float(left.max()), rel=2e-2)
    assert check.verdict == "good"
    assert method.meaning.cost != Ekfac().meaning.cost
    assert Ekfac().checks(job) == []


@pytest.mark.slow
def test_trap_layers_are_not_independent():
    """Two layers in one system: their cross terms, which EK-FAC leaves out, are in the refined solution."""
    patterns = ("transformer.h.0.attn.c_proj.bias", "transformer.h.1.attn.c_proj.bias")

    def scores(*given: str, **options) -> torch.Tensor:
        return all_scores(Ekfac(labels="data", **options), model_job("gpt2", patterns=given, train=5, damping=0.1))

    for options, equal in (({}, True), ({"refine": "cg:40"}, False)):
        both, alone = scores(*patterns, **options), sum(scores(one, **options) for one in patterns)
        assert torch.allclose(both, alone, rtol=1e-3, atol=1e-4 * float(both.abs().max())) == equal


@pytest.fixture
def system():
    """(matrix, its approximate inverse, vectors), eigenvalues over six decades, the inverse off by a factor of 3."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(24, 24, generator=generator, dtype=torch.float64)).Q
    values = torch.logspace(0, -6, 24, dtype=torch.float64)
    off = 3.0 ** torch.linspace(-1, 1, 24, dtype=torch.float64)
    vectors = torch.randn(3, 24, generator=generator, dtype=torch.float64) * torch.tensor([[1.0], [1e-6], [0.0]])
    return basis @ torch.diag(values) @ basis.T, basis @ torch.diag(off / (values + 1e-4)) @ basis.T, vectors


def test_preconditioned_steps_solve_and_need_fewer_products(system):
    matrix, inverse, vectors = system
    expected = torch.linalg.solve(matrix + 1e-4 * torch.eye(24, dtype=torch.float64), vectors.T).T
    given = {"steps": 200, "tolerance": 1e-8}
    plain = conjugate_gradient(lambda v: v @ matrix, vectors, 1e-4, **given)
    found = conjugate_gradient(lambda v: v @ matrix, vectors, 1e-4, precondition=lambda v: v @ inverse, **given)
    assert torch.allclose(found.vectors, expected, rtol=1e-5, atol=1e-12)
    assert found.steps < plain.steps
    start = vectors - vectors @ inverse @ (matrix + 1e-4 * torch.eye(24, dtype=torch.float64))
    assert torch.allclose(found.begun[:2], start.norm(dim=1)[:2] / vectors.norm(dim=1)[:2])


def test_a_damping_for_each_entry_is_a_diagonal(system):
    matrix, inverse, vectors = system
    added = torch.logspace(-3, 0, 24, dtype=torch.float64)
    expected = torch.linalg.solve(matrix + torch.diag(added), vectors.T).T
    for precondition in (None, lambda v: v @ inverse):
        found = conjugate_gradient(
            lambda v: v @ matrix, vectors, added, steps=100, tolerance=1e-10, precondition=precondition
        )
        assert torch.allclose(found.vectors, expected, rtol=1e-6, atol=1e-14)


def test_neumann_steps_are_the_explicit_series(system):
    matrix, inverse, vectors = system
    whole = matrix + 1e-4 * torch.eye(24, dtype=torch.float64)
    expected = vectors @ inverse
    for _ in range(7):
        expected = expected + (vectors - expected @ whole) @ inverse / 4
    found = neumann(lambda _, v: v @ matrix, vectors, 1e-4, lambda v: v @ inverse, scale=4.0, steps=7)
    assert torch.allclose(found, expected, rtol=1e-9)


def test_an_option_that_is_no_refinement_is_refused_with_an_example():
    for given in ("cg", "cg:0", "adam:3", "cg:-1"):
        with pytest.raises(SpecError, match="cg:N"):
            get_method("ekfac", refine=given)
    assert get_method("ekfac", refine="none") == get_method("ekfac")
