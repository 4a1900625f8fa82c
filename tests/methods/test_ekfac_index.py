"""EK-FAC from an index: against explicit matrices and explicit sketches, with factors that are kept."""

import dataclasses
from pathlib import Path

import pytest
import torch

from tests.methods.conftest import all_scores
from tests.methods.test_curvature_methods import curvature, gradients, small_job
from tests.reference.compress_dense import dense_matrix
from vestige.compress import parse_spec
from vestige.errors import SpecError
from vestige.indexes import Inputs, build_index
from vestige.methods import Ekfac, EkfacIndex, Job
from vestige.settings import IndexSettings


def indexed_job(folder: Path, compress: str, **given) -> Job:
    """A Conv1D with its bias, and an index of them."""
    job = small_job(**given)
    made = IndexSettings(
        model="m", data="d", out=folder / "index", compress=compress, dtype="float32", **SCOPES[compress]
    )
    assert job.loaded is not None
    assert job.selection is not None
    return dataclasses.replace(job, index=build_index(made, Inputs(job.loaded, job.train, job.selection)))


SCOPES = {
    **{spec: {} for spec in ("none", "tensorsketch:48", "mask:8x8 | sjlt:32", "logra:6x6", "sjlt:40", "gauss:24")},
    "mask:100": {},
    "tensorsketch:64 | sjlt:64": {"compress_scope": "model"},
}


def sketched(job: Job, rows: torch.Tensor, compress: str) -> torch.Tensor:
    """Lines `[W | b]` under the explicit matrix of every component's compressor, side by side or summed."""
    shared, parts = "compress_scope" in SCOPES[compress], []
    whole = rows.view(-1, 16, 17)
    for part in job.components:
        entries = whole[:, :, :16] if part.shape[1] > 1 else whole[:, :, 16:]
        built = parse_spec(compress).build(part.name, part.shape, 0, shared=shared)
        parts.append(entries.flatten(1) @ dense_matrix(built).T)
    return torch.stack(parts).sum(0) if shared else torch.cat(parts, dim=1)


@pytest.mark.parametrize("compress", SCOPES)
def test_trap_queries_are_preconditioned_whole_and_compressed_then(tmp_path, compress):
    job = indexed_job(tmp_path, compress)
    solved = torch.linalg.solve(curvature("ekfac", job), gradients(job.queries).T).T
    expected = sketched(job, solved, compress) @ sketched(job, gradients(job.train), compress).T
    found = all_scores(EkfacIndex(labels="data"), job)
    assert torch.allclose(found, expected, rtol=2e-3, atol=2e-4 * float(expected.abs().max()))


def test_an_index_that_compresses_nothing_gives_the_scores_of_ekfac(tmp_path):
    job = indexed_job(tmp_path, "none")
    exact = all_scores(Ekfac(), dataclasses.replace(job, index=None))
    assert torch.allclose(all_scores(EkfacIndex(), job), exact, rtol=1e-3, atol=1e-4 * float(exact.abs().max()))


def test_factors_are_measured_once_and_kept_with_the_index(tmp_path):
    job = indexed_job(tmp_path, "sjlt:40")
    assert job.index is not None
    first = all_scores(EkfacIndex(), job)
    (kept,) = (job.index.folder / "curvature").iterdir()
    written = kept.stat().st_mtime_ns
    assert torch.equal(all_scores(EkfacIndex(), job), first)
    # The streaming method reads the same file.
    all_scores(Ekfac(), job)
    assert [path.stat().st_mtime_ns for path in (job.index.folder / "curvature").iterdir()] == [written]
    # Trap: factors of other labels are other factors.
    assert not torch.allclose(all_scores(EkfacIndex(labels="data"), job), first, rtol=1e-2)
    kept.write_bytes(kept.read_bytes()[:100])
    assert torch.equal(all_scores(EkfacIndex(), job), first)


def test_several_dampings_are_measured_together(tmp_path):
    job = indexed_job(tmp_path, "sjlt:40")
    at = EkfacIndex().at_dampings(job)
    for damping in (0.01, 1.0):
        alone = dataclasses.replace(job, settings=job.settings.model_copy(update={"damping": damping}))
        expected = EkfacIndex().vectors(alone).vectors
        assert all(torch.equal(*pair) for pair in zip(at(damping).vectors, expected, strict=True))


def test_self_influence_is_refused_with_what_to_type(tmp_path):
    with pytest.raises(SpecError, match="--method ekfac"):
        EkfacIndex().self_scores(indexed_job(tmp_path, "sjlt:40"))
