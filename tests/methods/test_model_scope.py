"""Components added up into one compressed gradient of the whole model: the scores, and taking them apart again."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.architectures import build
from tests.methods.conftest import all_scores, model_job, tokenized
from tests.reference.compress_dense import dense_matrix
from tests.reference.gradients import example_gradients
from vestige.compress import parse_spec
from vestige.indexes import CompressedGradients, Inputs, build_index, lay_out
from vestige.methods import GradCos, GradDot, Influence, Job, TracIn, split_over_components, split_over_tokens
from vestige.models import LoadedModel, select_components
from vestige.settings import IndexSettings

GRASS = "mask:96 | sjlt:24"
DAMPING = 0.1
TRAIN, QUERIES = 20, 3


def shared_job(folder: Path, compress: str = GRASS, dtype: str = "float32", damping: float = DAMPING) -> Job:
    loaded = LoadedModel(build("llama", torch.float32), None, "llama", "f" * 64, 32)
    selection = select_components(loaded.model, ("attention", "norm"))
    train = tokenized(TRAIN, 1, "t")
    given = IndexSettings.model_validate(
        {"model": "m", "data": "d", "out": folder, "compress": compress, "compress_scope": "model", "dtype": dtype}
    )
    index = build_index(given, Inputs(loaded, train, selection))
    base = model_job("llama", damping=damping)
    return Job(train, tokenized(QUERIES, 2, "q"), base.settings, loaded, selection, index)


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Job:
    return shared_job(tmp_path_factory.mktemp("shared") / "index")


def whole_gradients(job: Job, data) -> dict[str, torch.Tensor]:
    """Gradients of every component, one example at a time, in float64: `[example, n]` each."""
    model = build("llama", torch.float64)
    rows = [
        example_gradients(model, torch.as_tensor(data.input_ids[row]).long(), torch.as_tensor(data.targets[row]))
        for row in range(len(data))
    ]
    return {part.name: torch.stack([row[part.name].flatten() for row in rows]) for part in job.components}


def dense_maps(job: Job) -> dict[str, torch.Tensor]:
    """`S_c` of every component as a float64 matrix."""
    assert job.index is not None
    manifest = job.index.manifest
    spec = parse_spec(manifest.compression.spec)
    return {
        part.name: dense_matrix(spec.build(part.name, part.shape, manifest.seed, shared=True))
        for part in manifest.components
    }


def test_one_row_is_the_sum_of_the_sketches_of_all_components(job):
    maps, gradients = dense_maps(job), whole_gradients(job, job.train)
    expected = sum(gradients[name] @ matrix.T for name, matrix in maps.items())
    assert job.index is not None
    assert job.index.width == 24
    assert torch.allclose(job.index.gradients_of(range(TRAIN)).double(), torch.as_tensor(expected), atol=1e-5)


def test_grass_is_influence_on_the_summed_sketch_with_one_matrix_and_relative_damping(job):
    """Dense float64: `q^T S^T (S G^T G S^T / N + d tr / k)^-1 S g`, and what each component gives to it."""
    maps = dense_maps(job)
    train, queries = whole_gradients(job, job.train), whole_gradients(job, job.queries)
    rows = torch.as_tensor(sum(train[name] @ matrix.T for name, matrix in maps.items()))
    asked = torch.as_tensor(sum(queries[name] @ matrix.T for name, matrix in maps.items()))
    fisher = rows.T @ rows / len(rows)
    damped = fisher + DAMPING * fisher.trace() / len(fisher) * torch.eye(len(fisher), dtype=torch.float64)
    vectors = torch.linalg.solve(damped, asked.T).T
    expected = vectors @ rows.T
    method = Influence()
    # Sums over tokens and the matrix itself are float32.
    tolerance = 1e-3 * float(expected.abs().max())
    assert torch.allclose(all_scores(method, job), expected, atol=tolerance)
    assert "one matrix for all" in method.meaning.normalisation
    pairs = split_over_components(job, method, [(0, 4), (2, 11), (1, 4)])
    assert pairs is not None
    for pair in pairs:
        parts = [float(vectors[pair.query] @ (maps[name] @ train[name][pair.row])) for name in maps]
        assert np.allclose(pair.scores, parts, atol=tolerance)
        assert sum(pair.scores) == pytest.approx(float(expected[pair.query, pair.row]), abs=tolerance)


def test_one_matrix_was_asked_for_or_not_is_the_same(job):
    assert torch.equal(all_scores(Influence(fisher="model"), job), all_scores(Influence(), job))


@pytest.mark.slow
@pytest.mark.parametrize("method", [GradDot(), GradCos(), Influence(relative="loss"), Influence(relative="cosine")])
def test_components_and_tokens_add_up_to_the_score(job, method):
    found = all_scores(method, job)
    tolerance = 1e-3 * float(found.abs().max())
    pairs = [(0, 4), (2, 11), (2, 3)]
    parts = split_over_components(job, method, pairs)
    assert parts is not None
    for part in parts:
        assert len(part.scores) == len(job.components)
        assert float(part.scores.sum()) == pytest.approx(float(found[part.query, part.row]), abs=tolerance)
    for part in split_over_tokens(job, method, pairs):
        assert float(part.scores.sum()) == pytest.approx(float(found[part.query, part.row]), abs=tolerance)


@pytest.mark.slow
def test_components_that_do_not_add_up_to_the_stored_score_are_spoken_of(tmp_path, monkeypatch, capfd):
    monkeypatch.delenv("VESTIGE_QUIET", raising=False)
    job = shared_job(tmp_path / "index")
    split_over_components(job, GradDot(), [(0, 4)])
    assert "add up to the listed scores within" not in capfd.readouterr().err
    assert job.loaded is not None
    with torch.no_grad():
        next(job.loaded.model.parameters()).mul_(1.5)
    split_over_components(job, GradDot(), [(0, 4)])
    assert "add up to the listed scores within" in capfd.readouterr().err


def test_other_methods_read_it_too(job):
    assert not all_scores(GradDot(), job).isnan().any()
    assert hasattr(TracIn, "components")


@pytest.mark.slow
def test_inner_products_of_whole_gradients_are_unbiased_over_seeds(job):
    """200 seeds, three standard errors, over the sum of the components: two matrices and two scales."""
    spec, data = parse_spec("mask:64 | sjlt:48"), job.train.subset(range(2))
    assert job.loaded is not None
    components = [*job.components[:2], *[part for part in job.components if part.shape[1] == 1][:2]]
    parts = whole_gradients(job, data)
    exact = sum(float(parts[part.name][0] @ parts[part.name][1]) for part in components)
    columns = lay_out(components, spec, "model")
    found = []
    for seed in range(200):
        with CompressedGradients(job.loaded, components, columns, spec, seed, "sum", "model") as compute:
            rows = compute.rows(data, [np.arange(2)]).gradients.double()
        found.append(float(rows[0] @ rows[1]))
    assert abs(np.mean(found) - exact) <= 3 * np.std(found, ddof=1) / 200**0.5


def test_trap_a_mask_over_the_whole_model_stays_a_mask(job):
    """dattri 8: summing the masks of chunks adds unrelated coordinates. Each kept entry has a sign of its own here."""
    for matrix in dense_maps(job).values():
        kept = (matrix != 0).sum(0)
        assert set(kept.tolist()) <= {0, 1}
        assert int(kept.sum()) == min(96, matrix.shape[1])
    signs = torch.cat([matrix.sum(0) for matrix in dense_maps(job).values()])
    signs = signs[signs != 0].sign()
    # Fair coins: four standard deviations.
    assert abs(float(signs.mean())) < 4 / len(signs) ** 0.5
