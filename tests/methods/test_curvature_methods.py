"""The methods that precondition whole gradients: against explicit matrices, for any batches, with the right sign."""

import dataclasses

import numpy as np
import pytest
import torch

from tests.architectures import build
from tests.methods.conftest import all_scores, model_job
from tests.reference import curvature as dense
from tests.reference.gradients import example_gradients, example_loss
from vestige.errors import SpecError, UserError
from vestige.methods import (
    Arnoldi,
    ConjugateGradient,
    DataInfMethod,
    Ekfac,
    Job,
    Kfac,
    Lissa,
    get_method,
    split_over_components,
    split_over_tokens,
)

LAYER = "transformer.h.0.attn.c_proj"
NAMES = [f"{LAYER}.weight", f"{LAYER}.bias"]

MAKE = {
    "ekfac": lambda: Ekfac(labels="data"),
    "kfac": lambda: Kfac(labels="data"),
    "kfac-split": lambda: Kfac(labels="data", split="factors"),
    "datainf": DataInfMethod,
    "cg": lambda: ConjugateGradient(tolerance=1e-4),
    "lissa": lambda: Lissa(depth=8),
    "arnoldi": lambda: Arnoldi(steps=15, rank=8),
}


def small_job(**given) -> Job:
    """One Conv1D with its bias: small enough for explicit matrices."""
    return model_job("gpt2", patterns=(f"{LAYER}.*",), train=5, **({"damping": 0.1} | given))


def gradients(data) -> torch.Tensor:
    """[example, out * (in + 1)] in float64: every line of the weight followed by its bias."""
    model, rows = build("gpt2"), []
    for ids, targets in zip(data.input_ids, data.targets, strict=True):
        found = example_gradients(model, torch.as_tensor(ids).long(), torch.as_tensor(targets))
        rows.append(torch.cat([found[NAMES[0]].T, found[NAMES[1]][:, None]], dim=1).flatten())
    return torch.stack(rows)


def curvature(name: str, job: Job) -> torch.Tensor:
    """The damped matrix whose inverse the method approximates, or equals, in the order of `gradients`."""
    rows = gradients(job.train)
    if name in ("ekfac", "kfac"):
        left, right, tokens = dense.kronecker(build("gpt2"), LAYER, job.train)
        whole = [row.view(16, 17) for row in rows]
        matrix = dense.eigen_corrected(left, right, whole) if name == "ekfac" else tokens * torch.kron(left, right)
        return dense.damped(matrix, 0.1)
    matrix = dense.gauss_newton(build("gpt2"), NAMES, job.train)
    weight, bias = torch.arange(256).view(16, 16).T, torch.arange(256, 272)
    place = torch.cat([weight, bias[:, None]], dim=1).flatten()
    damping = 0.1 * rows.square().sum(1).mean() / 272
    return matrix[place][:, place] + damping * torch.eye(272, dtype=torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ekfac", "kfac", "cg"])
def test_scores_equal_those_of_the_explicit_matrix(name):
    job = small_job()
    expected = gradients(job.queries) @ torch.linalg.solve(curvature(name, job), gradients(job.train).T)
    found = all_scores(ConjugateGradient(steps=60, tolerance=1e-6) if name == "cg" else MAKE[name](), job)
    # The model of the job is float32: its gradients and Gauss-Newton products carry about 1e-6 each.
    assert torch.allclose(found, expected, rtol=2e-3, atol=2e-4 * float(expected.abs().max()))


def test_lissa_is_the_explicit_series():
    """With a given scale, k steps are a polynomial of the matrix."""
    job = small_job()
    matrix, train = curvature("lissa", job), gradients(job.train)
    scale = 1.2 * float(torch.linalg.eigvalsh(matrix).max())
    step = torch.eye(272, dtype=torch.float64) - matrix / scale
    solved = found = train.T / scale
    for _ in range(10):
        solved = step @ solved + train.T / scale
    found = all_scores(Lissa(depth=10, scale=scale), job)
    expected = gradients(job.queries) @ solved
    assert torch.allclose(found, expected, rtol=2e-3, atol=2e-4 * float(expected.abs().max()))


def test_arnoldi_is_the_inverse_in_the_span_of_the_dominant_eigenvectors():
    job = small_job()
    values, vectors = torch.linalg.eigh(curvature("arnoldi", job))
    kept = vectors[:, -3:]
    span = kept @ torch.diag(1 / values[-3:]) @ kept.T
    expected = gradients(job.queries) @ span @ gradients(job.train).T
    found = all_scores(Arnoldi(steps=40, rank=3), job)
    assert torch.allclose(found, expected, rtol=5e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_scores_do_not_depend_on_batches(make):
    """Trap: inverses of batches summed up; trap: a ragged last batch scaled differently."""
    # Damped enough for conjugate gradients to converge: before that, float32 rounding decides where they stand.
    whole, two, one = (all_scores(make(), small_job(token_budget=budget, damping=1.0)) for budget in (4096, 30, 1))
    tolerance = 2e-3 * float(whole.abs().max())
    assert torch.allclose(one, whole, rtol=1e-3, atol=tolerance)
    assert torch.allclose(two, whole, rtol=1e-3, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_sign_a_preconditioned_step_on_a_positive_example_lowers_the_query_loss(make):
    """Step from the weights along the inverse curvature times the example's gradient; look at the query's loss."""
    job = small_job()
    scores = all_scores(make(), job)[0]
    itself = dataclasses.replace(job, queries=job.train)
    method = make()
    steps = [method.prepare(itself).direction(row) for row in range(len(job.train))]
    for row in {int(scores.argmax()), int(scores.argmin())}:
        length = float(torch.stack([part.norm() for part in steps[row]]).norm())
        moved = query_loss(job, [part.double() * (1e-4 / length) for part in steps[row]])
        assert np.sign(moved - query_loss(job, None)) == -np.sign(float(scores[row]))


def query_loss(job: Job, step) -> float:
    model = build("gpt2")
    parameters = {name: value.detach().clone() for name, value in model.named_parameters()}
    for part, change in zip(job.components, step or (), strict=bool(step)):
        parameters[part.name] -= change.T if parameters[part.name].ndim == 2 else change[:, 0]
    ids, targets = torch.as_tensor(job.queries.input_ids[0]).long(), torch.as_tensor(job.queries.targets[0])
    return float(example_loss(model, parameters, ids, targets, False))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ekfac", "kfac-split", "datainf", "arnoldi"])
def test_components_tokens_and_self_scores_are_parts_of_the_same_score(name):
    job, method = small_job(tokens=True), MAKE[name]()
    scores, pairs = all_scores(method, job), [(0, 1), (2, 4)]
    tolerance = 1e-4 * float(scores.abs().max())
    components = split_over_components(job, method, pairs)
    assert components is not None
    for part in [*components, *split_over_tokens(job, method, pairs)]:
        assert abs(part.scores.sum() - float(scores[part.query, part.row])) <= tolerance
    diagonal = all_scores(MAKE[name](), dataclasses.replace(job, queries=job.train)).diagonal()
    for block in method.self_scores(job):
        assert torch.allclose(block.scores[0].double(), diagonal[block.rows], rtol=1e-3, atol=tolerance)
    assert (diagonal > 0).all()


@pytest.mark.parametrize("name", ["ekfac", "kfac", "datainf", "cg", "lissa", "arnoldi"])
def test_a_method_says_what_it_means_and_takes_no_index(name):
    found = get_method(name)
    assert found.name == name
    assert all(found.meaning.to_dict().values())
    assert (found.needs_model, found.needs_gradients, found.needs_index) == (True, True, False)


@pytest.mark.parametrize("name", ["ekfac", "kfac"])
def test_labels_are_drawn_by_default_and_change_the_curvature(name):
    job = small_job()
    drawn, again, given = get_method(name), get_method(name), MAKE[name]()
    first = all_scores(drawn, job)
    assert torch.equal(first, all_scores(again, job))
    assert not torch.allclose(first, all_scores(given, job), rtol=1e-2)


@pytest.mark.parametrize("name", MAKE)
def test_trap_damping_of_zero_is_refused(name):
    job = small_job()
    zero = job.settings.model_copy(update={"damping": 0.0})
    with pytest.raises(SpecError, match="above zero"):
        MAKE[name]().prepare(dataclasses.replace(job, settings=zero))


@pytest.mark.slow
def test_a_sample_of_the_data_is_measured_and_may_not_be_empty():
    job = small_job()
    whole, part = all_scores(ConjugateGradient(), job), all_scores(ConjugateGradient(examples=2), job)
    assert not torch.allclose(whole, part, rtol=1e-2)
    assert torch.equal(whole, all_scores(ConjugateGradient(examples=99), job))
    with pytest.raises(SpecError, match="were requested"):
        ConjugateGradient(examples=0).prepare(job)


@pytest.mark.slow
def test_stochastic_lissa_is_the_same_for_any_batches():
    one, whole = (
        all_scores(Lissa(depth=8, sample=2), small_job(token_budget=budget, damping=1.0)) for budget in (1, 4096)
    )
    assert torch.allclose(one, whole, rtol=1e-3, atol=1e-3 * float(whole.abs().max()))


def test_gradients_that_do_not_fit_are_refused_before_any_work(monkeypatch):
    class Memory:
        available = 2 * 4 * 3 * 272 - 1

    monkeypatch.setattr("psutil.virtual_memory", Memory)
    with pytest.raises(UserError, match="--method influence"):
        Ekfac().prepare(small_job())
