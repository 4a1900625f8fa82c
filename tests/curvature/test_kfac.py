"""K-FAC and EK-FAC against explicit Kronecker products in float64."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from tests.architectures import build
from tests.methods.conftest import reordered
from tests.reference import curvature as dense
from vestige.curvature import curvature_path, ekfac_of, find_blocks, kfac_of, sample_labels
from vestige.data import Example, TokenizedData
from vestige.errors import SpecError
from vestige.gradients import CausalLoss

from .conftest import measured, name_of, random_vectors, reference_gradients

# Conv1D (stored transposed) and Linear, both with a bias; both in the first block, whose every token has influence.
LAYERS = [
    ("gpt2", "transformer.h.0.attn.c_proj"),
    ("gpt2", "transformer.h.0.mlp.c_fc"),
    ("neox", "gpt_neox.layers.0.mlp.dense_4h_to_h"),
]


class Constant(nn.Module):
    """A model with the same logits at every position."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 1)
        self.scores = torch.randn(7, generator=torch.Generator().manual_seed(0))

    def get_input_embeddings(self):
        return self.words

    def forward(self, input_ids, use_cache=False):
        return SimpleNamespace(logits=self.scores.expand(*input_ids.shape, 7))


def joined(given, vectors) -> torch.Tensor:
    """[query, out * (in + 1)]: each line of the weight followed by its bias."""
    weight, bias = sorted(zip(given.components, vectors, strict=True), key=lambda pair: pair[0].shape[1] == 1)
    matrix = weight[1].view(-1, *weight[0].shape)
    return torch.cat([matrix, bias[1][:, :, None]], dim=2).flatten(1)


@pytest.mark.parametrize(("name", "layer"), LAYERS)
def test_factors_are_those_of_every_single_token(name, layer):
    given = measured(name, f"{layer}.*")
    (factor,) = kfac_of(given).factors
    left, right, tokens = dense.kronecker(build(name), layer, given.data)
    assert factor.tokens == pytest.approx(tokens), "padding and tokens after the last target must not be counted"
    assert torch.allclose(factor.left, left, rtol=1e-9, atol=1e-12)
    assert torch.allclose(factor.right, right, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("name", "layer"), LAYERS)
def test_trap_kfac_inverse_keeps_bias_and_columns_aligned(name, layer):
    given = measured(name, f"{layer}.*")
    vectors, factors = random_vectors(given), kfac_of(given)
    left, right, tokens = dense.kronecker(build(name), layer, given.data)
    expected = torch.linalg.solve(dense.damped(tokens * torch.kron(left, right), 0.1), joined(given, vectors).T).T
    found = joined(given, factors.eigenbases().precondition(vectors, 0.1))
    assert torch.allclose(found, expected, rtol=1e-7, atol=1e-9 * float(expected.abs().max()))

    absolute = 0.1 * tokens * left.trace() / len(left) * right.trace() / len(right)
    ratio = ((right.trace() / len(right)) / (tokens * left.trace() / len(left))) ** 0.5
    split = torch.kron(
        tokens * left + absolute**0.5 / ratio * torch.eye(len(left), dtype=left.dtype),
        right + absolute**0.5 * ratio * torch.eye(len(right), dtype=left.dtype),
    )
    expected = torch.linalg.solve(split, joined(given, vectors).T).T
    found = joined(given, factors.precondition_split(vectors, 0.1))
    assert torch.allclose(found, expected, rtol=1e-7, atol=1e-9 * float(expected.abs().max()))


@pytest.mark.parametrize(("name", "layer"), LAYERS)
def test_trap_ekfac_with_bias_equals_the_explicit_matrix(name, layer):
    """A peer misaligns weight and bias here, with a relative error of 1.21."""
    given = measured(name, f"{layer}.*")
    vectors, gradients = random_vectors(given), reference_gradients(given)
    order = sorted(range(2), key=lambda number: given.components[number].shape[1] == 1)
    whole = [torch.cat([gradients[order[0]][row], gradients[order[1]][row]], dim=1) for row in range(len(given.data))]
    left, right, _ = dense.kronecker(build(name), layer, given.data)
    matrix = dense.eigen_corrected(left, right, whole)
    expected = torch.linalg.solve(dense.damped(matrix, 0.1), joined(given, vectors).T).T
    found = joined(given, ekfac_of(given).precondition(vectors, 0.1))
    # Eigenvectors of close eigenvalues are only determined up to rounding over their gap.
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


def test_without_its_bias_a_weight_has_no_column_of_ones_and_a_lone_bias_has_its_exact_matrix():
    given = measured("gpt2", "transformer.h.0.attn.c_proj.weight", "transformer.h.1.mlp.c_proj.bias", "*.ln_f.*")
    weight, *vectors = find_blocks(given.components)
    assert (weight.kind, weight.bias, weight.shape) == ("matrix", None, (16, 16))
    assert [block.kind for block in vectors] == ["vector"] * 3
    solved = ekfac_of(given).precondition(asked := random_vectors(given), 0.1)
    plain = kfac_of(given).eigenbases().precondition(asked, 0.1)
    for number, gradients in list(enumerate(reference_gradients(given)))[1:]:
        rows = torch.stack(gradients)[:, :, 0]
        expected = torch.linalg.solve(dense.damped(rows.T @ rows / len(rows), 0.1), asked[number].T).T
        assert torch.allclose(solved[number], expected, rtol=1e-7)
        assert torch.allclose(plain[number], expected, rtol=1e-7)


def test_a_tied_embedding_has_the_mean_squares_of_its_whole_gradient(monkeypatch):
    monkeypatch.setattr(CausalLoss, "logit_bytes", 4 * 37 * 5)  # the loss arrives in pieces
    given = measured("gpt2", "transformer.wte.weight", budget=40)
    assert len(given.components[0].uses) == 2
    squares = torch.stack(reference_gradients(given)[0]).square().mean(0)
    asked = random_vectors(given)
    expected = asked[0] / (squares + 0.1 * squares.mean()).flatten()
    assert torch.allclose(ekfac_of(given).precondition(asked, 0.1)[0], expected, rtol=1e-8)


@pytest.mark.parametrize("labels", ["data", "sampled"])
def test_curvature_does_not_depend_on_batches(labels):
    patterns = ("transformer.h.1.*",)
    one, many = measured("gpt2", *patterns, labels=labels, budget=1), measured("gpt2", *patterns, labels=labels)
    asked = random_vectors(one)
    for fit in (ekfac_of, lambda given: kfac_of(given).eigenbases()):
        pairs = zip(fit(one).precondition(asked, 0.1), fit(many).precondition(asked, 0.1), strict=True)
        assert all(torch.allclose(first, second, rtol=1e-6, atol=1e-9) for first, second in pairs)


def test_every_component_comes_back_in_its_place():
    given = measured("gpt2", "all")
    asked = random_vectors(given)
    curvature = ekfac_of(given)
    solved = curvature.precondition(asked, 0.1)
    assert [len(part[0]) for part in solved] == [part.size for part in given.components]
    # Adding up the blocks' own matrices is the inverse of splitting them.
    for block in curvature.blocks:
        assert all(torch.equal(part, asked[number]) for number, part in block.split(block.join(asked)).items())


def test_drawn_labels_depend_on_the_tokens_alone():
    given = measured("llama", "all", train=6)
    alone = sample_labels(given.model, given.data, 1, 0)
    together = sample_labels(given.model, given.data, 4096, 0)
    backwards = sample_labels(given.model, reordered(given.data, [5, 4, 3, 2, 1, 0]), 50, 0)
    for row, labels in enumerate(alone):
        assert np.array_equal(labels, together[row])
        assert np.array_equal(labels, backwards[5 - row])
        assert np.array_equal(labels != -100, given.data.targets[row])
    others = sample_labels(given.model, given.data, 4096, 1)
    assert any(not np.array_equal(one, other) for one, other in zip(alone, others, strict=True))


def test_labels_are_drawn_with_the_probabilities_of_the_model():
    model, ids = Constant(), np.arange(40001, dtype=np.int32) % 7
    data = TokenizedData([Example("a", 0, text="a")], [ids], [np.arange(40001) > 0], np.zeros(1, dtype=bool), "a")
    (labels,) = sample_labels(model, data, 4096, 0)
    shares = torch.bincount(torch.from_numpy(labels[1:]), minlength=7) / 40000
    assert torch.allclose(shares, torch.softmax(model.scores, -1), atol=0.01)


@pytest.mark.parametrize("damping", [0.0, -0.1])
def test_trap_damping_of_zero_is_refused(damping):
    given = measured("gpt2", "transformer.h.0.attn.c_proj.*", train=3)
    asked, factors = random_vectors(given), kfac_of(given)
    for inverse in (factors.precondition_split, factors.eigenbases().precondition):
        with pytest.raises(SpecError, match="above zero"):
            inverse(asked, damping)


def test_half_precision_is_accumulated_in_float32():
    given = measured("gpt2", "transformer.h.0.attn.c_proj.*", train=3)
    given.model.to(torch.bfloat16)
    (factor,) = kfac_of(given).factors
    assert factor.left.dtype == factor.right.dtype == torch.float32


def test_kept_curvature_is_read_again_and_damage_is_mended(tmp_path: Path, monkeypatch):
    given = measured("gpt2", "transformer.h.0.attn.c_proj.*", "transformer.wte.weight", train=3)
    asked = random_vectors(given)
    made = ekfac_of(given, "model", tmp_path).precondition(asked, 0.1)
    plain = kfac_of(given, "model", tmp_path).precondition_split(asked, 0.1)
    path = curvature_path(tmp_path, "ekfac", given, "model")
    assert path is not None
    with monkeypatch.context() as patch:
        patch.setattr(given.model, "forward", lambda **_: pytest.fail("computed again"))
        again = ekfac_of(given, "model", tmp_path).precondition(asked, 0.1)
        assert all(torch.equal(one, other) for one, other in zip(made, again, strict=True))
        again = kfac_of(given, "model", tmp_path).precondition_split(asked, 0.1)
        assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))
    path.write_bytes(path.read_bytes()[:100])
    mended = ekfac_of(given, "model", tmp_path).precondition(asked, 0.1)
    assert all(torch.equal(one, other) for one, other in zip(made, mended, strict=True))


def test_the_name_of_kept_curvature_tells_apart_what_changes_it(tmp_path: Path):
    given = measured("gpt2", "transformer.h.0.attn.c_proj.*", train=3)
    others = [
        measured("gpt2", "transformer.h.0.attn.c_proj.weight", train=3),
        measured("gpt2", "transformer.h.0.attn.c_proj.*", train=3, labels="sampled"),
        measured("gpt2", "transformer.h.0.attn.c_proj.*", train=3, labels="sampled", seed=1),
        measured("gpt2", "transformer.h.0.attn.c_proj.*", train=3, reduction="mean"),
    ]
    paths = [curvature_path(tmp_path, "ekfac", one, "model") for one in (given, *others)]
    paths += [curvature_path(tmp_path, "kfac", given, "model"), curvature_path(tmp_path, "ekfac", given, "another")]
    assert len(set(paths)) == len(paths)
    assert curvature_path(None, "ekfac", given, "model") is None


def test_reference_helpers_agree_on_the_layout():
    """The gradient that the layer's factors add up to is autograd's."""
    given = measured("gpt2", "transformer.h.0.mlp.c_fc.weight", train=2)
    ids, targets = torch.as_tensor(given.data.input_ids[1]).long(), torch.as_tensor(given.data.targets[1])
    left, right = dense.layer_factors(build(name_of(given)), "transformer.h.0.mlp.c_fc", ids, targets)
    assert torch.allclose(left.T @ right[:, :-1], reference_gradients(given)[0][1])
