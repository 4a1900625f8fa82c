"""Influence with the exact empirical Fisher matrix, by its dense solve and by its dual form over examples."""

import pytest
import torch

from tests.methods.conftest import all_scores, model_job
from tests.methods.test_influence_options import indexed_job, stored
from tests.reference.gradients import example_gradients
from vestige.methods import Influence, Job

DAMPING = 0.1


@pytest.fixture(scope="module")
def exact(tmp_path_factory) -> Job:
    """Uncompressed: 30 examples, 1536 columns, so the matrix has rank 30 at most and the damping decides the rest."""
    return indexed_job(tmp_path_factory.mktemp("exact"), "none", DAMPING)


def dual(queries: torch.Tensor, rows: torch.Tensor, damping: float) -> torch.Tensor:
    """`q^T (G^T G / n + d I)^-1 g` by Woodbury: only the n by n matrix of inner products is inverted."""
    products = rows @ rows.T
    kernel = products + len(rows) * damping * torch.eye(len(rows), dtype=torch.float64)
    return (queries @ rows.T - queries @ rows.T @ torch.linalg.solve(kernel, products)) / damping


def parts_of(job: Job, fisher: str) -> list[slice]:
    assert job.index is not None
    components = job.index.manifest.components
    return [slice(0, components[-1].stop)] if fisher == "model" else [slice(one.start, one.stop) for one in components]


@pytest.mark.parametrize("fisher", ["component", "model"])
def test_exact_influence_equals_the_dense_solve_and_the_dual_form(exact, fisher):
    rows = stored(exact)
    solved, doubled = (torch.zeros(30, 30, dtype=torch.float64) for _ in range(2))
    for part in parts_of(exact, fisher):
        columns = rows[:, part]
        matrix = columns.T @ columns / 30
        damping = DAMPING * float(matrix.trace()) / len(matrix)
        solved += columns @ torch.linalg.solve(
            matrix + damping * torch.eye(len(matrix), dtype=torch.float64), columns.T
        )
        doubled += dual(columns, columns, damping)
    torch.testing.assert_close(solved, doubled, rtol=1e-8, atol=1e-8 * float(solved.abs().max()))
    found = all_scores(Influence(fisher=fisher), exact)
    # F is a sum in float32, whose rounding an inverse at a tenth of the mean eigenvalue amplifies.
    torch.testing.assert_close(found, solved, rtol=1e-3, atol=1e-4 * float(solved.abs().max()))


def test_the_stored_rows_are_the_gradients_that_the_matrix_is_made_of(exact):
    model = model_job("llama").loaded
    assert exact.index is not None
    assert model is not None
    rows = stored(exact)
    for row in (0, 17):
        ids, targets = exact.train.input_ids[row], exact.train.targets[row]
        wanted = example_gradients(model.model, torch.as_tensor(ids).long(), torch.as_tensor(targets))
        for part in exact.index.manifest.components:
            torch.testing.assert_close(
                rows[row, part.start : part.stop], wanted[part.name].flatten().double(), rtol=1e-3, atol=1e-4
            )
