"""Relative influence, one matrix for all components, plain damping, and the published settings of LoGra and GraSS."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.architectures import build
from tests.methods.conftest import all_scores, model_job, settings, tokenized
from vestige.errors import SpecError
from vestige.indexes import Index, Inputs, build_index
from vestige.methods import Influence, Job, get_method, split_over_components
from vestige.models import LoadedModel, select_components
from vestige.settings import IndexSettings

DAMPING = 0.5


def indexed_job(folder: Path, compress: str = "tensorsketch:12", damping: float = DAMPING) -> Job:
    loaded = LoadedModel(build("llama", torch.float32), None, "llama", "f" * 64, 32)
    selection = select_components(loaded.model, ("attention",))
    train = tokenized(30, 1, "t")
    given = IndexSettings(model="m", data="d", out=folder / "index", compress=compress, dtype="float32")
    index = build_index(given, Inputs(loaded, train, selection))
    base = model_job("llama", patterns=("attention",), damping=damping)
    return Job(train, train, base.settings, loaded, selection, index)


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Job:
    return indexed_job(tmp_path_factory.mktemp("relative"))


def stored(job: Job) -> torch.Tensor:
    """Compressed gradients of all examples, which here are the queries too."""
    assert job.index is not None
    return job.index.gradients_of(range(30)).double()


def dense_inverse(job: Job, gradients: torch.Tensor, model: bool, absolute: bool, damping: float) -> torch.Tensor:
    """`(F + d I)^-1` as one matrix over all columns."""
    assert job.index is not None
    width = gradients.shape[1]
    fisher = gradients.T @ gradients / len(gradients)
    parts = [slice(part.start, part.stop) for part in job.index.manifest.components]
    damped = torch.zeros(width, width, dtype=torch.float64)
    for part in [slice(0, width)] if model else parts:
        block = fisher[part, part]
        scale = 1.0 if absolute else float(block.trace()) / len(block)
        damped[part, part] = block + damping * scale * torch.eye(len(block), dtype=torch.float64)
    return torch.linalg.inv(damped)


@pytest.mark.parametrize("unit", ["mean-eigenvalue", "one"])
@pytest.mark.parametrize("fisher", ["component", "model"])
@pytest.mark.parametrize("relative", ["none", "theta", "loss", "cosine"])
def test_scores_are_those_of_the_explicit_matrix(job, relative, fisher, unit):
    gradients = stored(job)
    inverse = dense_inverse(job, gradients, fisher == "model", unit == "one", DAMPING)
    scores = gradients @ inverse @ gradients.T
    own = scores.diagonal().clone()
    if relative == "theta":
        scores = scores / (gradients @ inverse).norm(dim=1)
    elif relative != "none":
        scores = scores / own.sqrt()
    if relative == "cosine":
        scores = scores / own.sqrt()[:, None]
    method = Influence(relative=relative, fisher=fisher, damping_unit=unit)
    found = all_scores(method, job)
    tolerance = 1e-4 * float(scores.abs().max())
    assert torch.allclose(found, scores, rtol=1e-3, atol=tolerance)
    pairs = split_over_components(job, method, [(0, 5), (7, 2)])
    assert pairs is not None
    assert all(abs(part.scores.sum() - float(found[part.query, part.row])) <= tolerance for part in pairs)
    if relative == "cosine":
        assert torch.allclose(found.diagonal(), torch.ones(30, dtype=torch.float64), atol=1e-3)
        with pytest.raises(SpecError, match="is 1 for every example"):
            list(method.self_scores(job))
        return
    for block in method.self_scores(job):
        assert torch.allclose(block.scores[0].double(), scores.diagonal()[block.rows], rtol=1e-3, atol=tolerance)


def test_relative_scores_say_what_they_are():
    meanings = [get_method("influence", relative=one).meaning for one in ("none", "theta", "loss", "cosine")]
    assert len({meaning.unit for meaning in meanings}) == len({meaning.normalisation for meaning in meanings}) == 4
    assert "one matrix for all" in Influence(fisher="model").meaning.normalisation


def test_an_example_ten_times_as_loud_is_no_more_influential_by_its_loss(job):
    """With the curvature fixed, a gradient times ten has the same relative score."""
    gradients = stored(job)
    inverse = dense_inverse(job, gradients, False, False, DAMPING)
    louder = torch.cat([gradients[:1], 10 * gradients[:1]])
    own = ((louder @ inverse) * louder).sum(1)
    for lengths in (own.sqrt(), (louder @ inverse).norm(dim=1)):
        scores = (louder @ inverse @ gradients[3]) / lengths
        assert float(scores[0]) == pytest.approx(float(scores[1]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compress", "damping", "options"),
    [("logra:4x4", 0.1, {}), ("mask:8x8 | sjlt:16", 1e-3, {}), ("mask:64 | sjlt:16", 1e-3, {"fisher": "model"})],
)
def test_published_settings_are_settings_of_influence(tmp_path, compress, damping, options):
    """LoGra: a tenth of the mean eigenvalue. GraSS and FactGraSS: `lambda tr(F) / d`, by layer or for all of them."""
    job = indexed_job(tmp_path, compress, damping)
    gradients = stored(job)
    fisher = gradients.T @ gradients / len(gradients)
    expected = torch.zeros(30, 30, dtype=torch.float64)
    assert job.index is not None
    parts = [slice(part.start, part.stop) for part in job.index.manifest.components]
    for part in [slice(0, gradients.shape[1])] if options else parts:
        block = fisher[part, part]
        damped = block + damping * block.trace() / len(block) * torch.eye(len(block), dtype=torch.float64)
        expected += gradients[:, part] @ torch.linalg.solve(damped, gradients[:, part].T)
    found = all_scores(Influence(**options), job)
    # F is kept in float32: at a thousandth of the mean eigenvalue its rounding is amplified a thousandfold.
    assert torch.allclose(found, expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.slow
def test_trap_damping_of_zero_is_refused_not_divided_by(job):
    """dattri 3: a default regularisation of 0 gives scores that are not finite."""
    for damping in (0, -1.0):
        with pytest.raises(SpecError, match="damping"):
            settings(damping=damping)
    zero = job.settings.model_copy(update={"damping": 0.0})
    options: dict[str, Any]
    for options in ({}, {"damping_unit": "one"}, {"relative": "theta"}, {"fisher": "model"}):
        with pytest.raises(SpecError, match="above zero"):
            Influence(**options).prepare(dataclasses.replace(job, settings=zero))


@pytest.mark.slow
def test_trap_another_damping_rewrites_nothing(tmp_path):
    """GraSS 8: preconditioning the training side rewrites the store for every damping; here the query is."""

    def contents() -> dict[str, str]:
        files = [path for path in sorted((tmp_path / "index").rglob("*")) if path.is_file()]
        return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    job = indexed_job(tmp_path)
    all_scores(Influence(), job)
    before, first = contents(), all_scores(Influence(), job)
    other = job.settings.model_copy(update={"damping": 0.01})
    assert not torch.allclose(all_scores(Influence(), dataclasses.replace(job, settings=other)), first, rtol=1e-2)
    assert contents() == before
    assert Index.open(tmp_path / "index").fingerprint


def test_trap_the_default_damping_needs_no_truth():
    """GraSS 4: the damping is chosen by comparison with retraining, which nobody has; ours is a fixed number."""
    assert settings().damping == 1.0
