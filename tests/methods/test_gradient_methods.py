"""The gradient methods against inner products of `torch.func` gradients, and what their scores are made of."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.architectures import build
from tests.methods.conftest import all_scores, model_job, tokenized
from tests.reference.gradients import example_gradients
from vestige.curvature import accumulate_fisher
from vestige.data import TokenizedData
from vestige.errors import SpecError
from vestige.indexes import Inputs, build_index
from vestige.methods import GradCos, GradDot, Influence, Job, split_over_components, split_over_tokens
from vestige.models import LoadedModel, select_components
from vestige.settings import IndexSettings

ARCHITECTURES = ["gpt2", "llama", "neox", "opt"]


def reference(job: Job, data: TokenizedData) -> torch.Tensor:
    """Whole gradients of every example, in float64, one at a time."""
    assert job.loaded is not None
    model = build(job.loaded.name)
    rows = []
    for ids, targets in zip(data.input_ids, data.targets, strict=True):
        found = example_gradients(
            model, torch.as_tensor(ids).long(), torch.as_tensor(targets), job.settings.loss == "mean"
        )
        rows.append(torch.cat([found[part.name].flatten() for part in job.components]))
    return torch.stack(rows)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["sum", "mean"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_exact_scores_equal_the_reference(name, loss):
    job = model_job(name, loss=loss)
    train, queries = reference(job, job.train), reference(job, job.queries)
    dots = queries @ train.T
    assert torch.allclose(all_scores(GradDot(), job), dots, rtol=1e-4, atol=1e-5 * float(dots.abs().max()))
    cosines = dots / queries.norm(dim=1)[:, None] / train.norm(dim=1)
    assert torch.allclose(all_scores(GradCos(), job), cosines, atol=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_self_influence_is_the_squared_norm(name):
    job = model_job(name)
    squared = torch.zeros(len(job.train), dtype=torch.float64)
    for block in GradDot().self_scores(job):
        squared[block.rows] = block.scores[0].double()
    assert torch.allclose(squared, reference(job, job.train).square().sum(1), rtol=1e-4)


def test_cosine_self_influence_is_refused_with_the_reason():
    with pytest.raises(SpecError, match="1 for every example"):
        GradCos().self_scores(model_job("llama"))


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["sum", "mean"])
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("method", [GradDot, GradCos])
def test_components_and_tokens_add_up_to_the_score(name, loss, method):
    made, job = method(), model_job(name, loss=loss, tokens=True)
    scores = all_scores(made, job)
    check_sums(made, job, scores)


def check_sums(method, job: Job, scores: torch.Tensor) -> None:
    pairs = [(query, row) for query in range(len(job.queries)) for row in range(len(job.train))]
    tolerance = 2e-5 * float(scores.abs().max())
    components = split_over_components(job, method, pairs)
    assert components is not None
    for part in components:
        assert abs(part.scores.sum() - float(scores[part.query, part.row])) <= tolerance
    tokens = split_over_tokens(job, method, pairs)
    assert len(tokens) == len(pairs)
    for part in tokens:
        assert abs(part.scores.sum() - float(scores[part.query, part.row])) <= tolerance
        assert not part.scores[~job.train.targets[part.row]].any(), "only predicted tokens have a share"


@pytest.mark.slow
def test_a_token_has_the_score_of_an_example_that_learns_it_alone():
    """The share of token t is the score of the same example with every other target masked."""
    job = model_job("gpt2", tokens=True)
    shares = split_over_tokens(job, GradDot(), [(0, 4)])[0].scores
    targets = job.train.targets[4]
    for position in np.flatnonzero(targets):
        alone = np.zeros_like(targets)
        alone[position] = True
        train = TokenizedData(
            job.train.examples[4:5], job.train.input_ids[4:5], [alone], job.train.truncated[4:5], "alone"
        )
        single = all_scores(GradDot(), Job(train, job.queries, job.settings, job.loaded, job.selection))
        assert float(single[0, 0]) == pytest.approx(shares[position], rel=1e-3, abs=1e-6)


@pytest.fixture
def indexed(tmp_path: Path) -> Job:
    model = build("llama", torch.float32)
    loaded = LoadedModel(model, None, "llama", "f" * 64, 32)
    selection = select_components(model, ("attention", "mlp"))
    train = tokenized(30, 1, "t")
    given = IndexSettings(model="m", data="d", out=tmp_path / "index", compress="none", dtype="float32")
    index = build_index(given, Inputs(loaded, train, selection))
    base = model_job("llama", patterns=("attention", "mlp"), damping=0.5)
    return Job(train, base.queries, base.settings, loaded, selection, index)


@pytest.mark.slow
def test_an_uncompressed_index_gives_the_exact_scores(indexed):
    exact = Job(indexed.train, indexed.queries, indexed.settings, indexed.loaded, indexed.selection)
    for method in (GradDot, GradCos):
        stored, direct = all_scores(method(), indexed), all_scores(method(), exact)
        assert torch.allclose(stored, direct, rtol=1e-4, atol=1e-5 * float(direct.abs().max()))


@pytest.mark.slow
def test_influence_solves_with_the_damped_fisher_matrix_of_each_component(indexed):
    train, queries = reference(indexed, indexed.train), reference(indexed, indexed.queries)
    expected, start = torch.zeros(3, 30, dtype=torch.float64), 0
    for component in indexed.components:
        part = slice(start, start + component.size)
        start += component.size
        fisher = train[:, part].T @ train[:, part] / 30
        damped = fisher + 0.5 * fisher.trace() / component.size * torch.eye(component.size)
        expected += queries[:, part] @ torch.linalg.solve(damped, train[:, part].T)
    scores = all_scores(Influence(), indexed)
    assert torch.allclose(scores, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    check_sums(Influence(), indexed, scores)


def test_self_influence_is_the_score_of_an_example_asked_about_itself(indexed):
    itself = Job(indexed.train, indexed.train, indexed.settings, indexed.loaded, indexed.selection, indexed.index)
    diagonal = all_scores(Influence(), itself).diagonal()
    for block in Influence().self_scores(indexed):
        assert torch.allclose(block.scores[0].double(), diagonal[block.rows], rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("method", [GradDot, GradCos, Influence])
def test_sign_a_step_on_a_positive_example_lowers_the_query_loss(indexed, method):
    """Move the weights a little along the example's descent direction and look at the query's loss."""
    scores = all_scores(method(), indexed)[0]
    if method is Influence:  # its step is preconditioned, which keeps the sign of a self-score
        itself = Job(indexed.train, indexed.train, indexed.settings, indexed.loaded, indexed.selection, indexed.index)
        assert (all_scores(Influence(), itself).diagonal() > 0).all()
        return
    for row in (int(scores.argmax()), int(scores.argmin())):
        change = loss_after_step(indexed, row) - loss_after_step(indexed, None)
        assert np.sign(change) == -np.sign(float(scores[row]))


def loss_after_step(job: Job, row: int | None) -> float:
    model = build("llama")
    ids, targets = job.queries.input_ids[0], job.queries.targets[0]
    if row is not None:
        gradient = example_gradients(
            model, torch.as_tensor(job.train.input_ids[row]).long(), torch.as_tensor(job.train.targets[row])
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if any(name == component.name for component in job.components):
                    parameter -= 1e-5 * gradient[name]
    tokens = torch.as_tensor(ids).long()
    log_probabilities = torch.log_softmax(model(tokens[None]).logits[0], -1).detach()
    return float(-sum(log_probabilities[t - 1, tokens[t]] for t in range(1, len(tokens)) if targets[t]))


def test_fisher_blocks_do_not_depend_on_how_the_rows_arrive():
    gradients = torch.randn(50, 12, generator=torch.Generator().manual_seed(0))
    columns = [slice(0, 5), slice(5, 12)]
    whole = accumulate_fisher(["a", "b"], columns, [gradients])
    parts = accumulate_fisher(["a", "b"], columns, gradients.split(7))
    for one, other in zip(whole.blocks, parts.blocks, strict=True):
        assert torch.allclose(one.matrix, other.matrix, atol=1e-6)
    assert torch.allclose(whole.blocks[0].matrix, gradients[:, :5].T @ gradients[:, :5] / 50, atol=1e-6)
