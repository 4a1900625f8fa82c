"""Measures of tokens, choices and texts under one model."""

import math
import zlib

import numpy as np
import pytest
import torch

from tests.reference import audit as reference
from vestige import measures
from vestige.errors import DataError, SpecError


@pytest.fixture(scope="module")
def spoken():
    draw = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(5, 9, 11, generator=draw, dtype=torch.float64)
    labels = torch.randint(0, 11, (5, 9), generator=draw)
    labels[0, :3], labels[3, 4:], labels[4] = -100, -100, -100
    return logits, labels, reference.token_values(logits.tolist(), labels.tolist())


def same(found, wanted):
    np.testing.assert_allclose(np.asarray(found)[:4], wanted, rtol=1e-12)
    assert math.isnan(float(found[4]))  # No target, no value.


def test_loss_is_the_mean_over_targets(spoken):
    logits, labels, known = spoken
    same(measures.loss(measures.token_scores(logits, labels)), [-np.mean([p for p, _ in row]) for row in known[:4]])


def test_answer_loss_sees_the_answer_alone(spoken):
    logits, labels, known = spoken
    answer = torch.zeros_like(labels, dtype=torch.bool)
    answer[1:4, 2] = True
    found = measures.answer_loss(measures.token_scores(logits, labels), answer)
    np.testing.assert_allclose(found[1:4], [-row[2][0] for row in known[1:4]], rtol=1e-12)
    assert torch.isnan(found[[0, 4]]).all()


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 1.0])
def test_min_k_averages_the_lowest_tokens(spoken, share):
    logits, labels, known = spoken
    scores = measures.token_scores(logits, labels)
    same(measures.min_k(scores, share), [reference.lowest_mean([p for p, _ in row], share) for row in known[:4]])
    same(
        measures.min_k_plus_plus(scores, share),
        [reference.lowest_mean([z for _, z in row], share) for row in known[:4]],
    )
    with pytest.raises(SpecError, match="share"):
        measures.min_k(scores, 0.0)


def test_tokens_that_are_ruled_out_and_equal_chances_stay_finite():
    logits = torch.zeros(1, 2, 4)
    logits[0, 0, 2:] = -torch.inf
    scores = measures.token_scores(logits, torch.zeros(1, 2, dtype=torch.long))
    assert torch.isfinite(scores.standardised).all()
    assert torch.isfinite(scores.log_probability).all()
    with pytest.raises(DataError, match="differ"):
        measures.token_scores(logits, torch.zeros(1, 3, dtype=torch.long))


def test_gap_accuracy_and_brier_over_the_choices_that_are_offered():
    logits = torch.tensor([[1.0, 3.0, 2.0], [5.0, 1.0, 9.0], [1.0, 1.0, 0.0], [4.0, 0.0, 0.0]])
    offered = torch.tensor([[True] * 3, [True, True, False], [True] * 3, [True, False, False]])
    right = torch.tensor([1, 0, 0, 0])
    np.testing.assert_array_equal(measures.logit_gap(logits, right, offered), [1.0, 4.0, 0.0, math.nan])
    np.testing.assert_array_equal(measures.accuracy(logits, right, offered), [1.0, 1.0, 0.5, math.nan])
    wanted = []
    for row, allowed, label in zip(logits.tolist(), offered.tolist(), right.tolist(), strict=True):
        chances = [math.exp(z) if ok else 0.0 for z, ok in zip(row, allowed, strict=True)]
        wanted.append(sum((c / sum(chances) - (k == label)) ** 2 for k, c in enumerate(chances)))
    np.testing.assert_allclose(measures.brier(logits, right, offered), wanted, rtol=1e-12, atol=1e-15)
    with pytest.raises(DataError, match="Example 1 has choice 2"):
        measures.logit_gap(logits, torch.tensor([1, 2, 0, 0]), offered)


def test_margin_is_the_log_odds():
    losses = np.array([0.1, 1.0, 5.0, 700.0])
    odds = [math.log(math.exp(-v) / (1 - math.exp(-v))) for v in losses]
    np.testing.assert_allclose(measures.margin(losses), odds, rtol=1e-12)


def test_ratios_to_a_reference_and_to_zlib():
    losses = np.array([3.0, 900.0])
    np.testing.assert_allclose(measures.perplexity_ratio(losses, np.array([2.0, 1.0])), [1.0, 899.0])
    texts = ["again and again and again and again", ""]
    bits = [8 * len(zlib.compress(text.encode())) for text in texts]
    np.testing.assert_allclose(measures.zlib_ratio(losses, texts), losses / math.log(2) / bits)
    with pytest.raises(DataError):
        measures.perplexity_ratio(losses, losses[:1])
    with pytest.raises(DataError):
        measures.zlib_ratio(losses, texts[:1])


def test_norms_of_weights_and_of_their_change():
    draw = np.random.default_rng(0)
    start = {"a": draw.normal(size=(4, 3)), "b": draw.normal(size=5)}
    end = {name: each + draw.normal(size=each.shape) for name, each in start.items()}
    tensors = [{name: torch.from_numpy(each) for name, each in side.items()} for side in (end, start)]
    mean, each = measures.weight_norms(*tensors)
    change = end["a"] - start["a"]
    wanted = [np.linalg.norm(change, kind) for kind in ("fro", "nuc")] + [abs(change).max(), np.linalg.norm(change, 2)]
    np.testing.assert_allclose(each["a"], wanted, rtol=1e-12)
    assert mean.frobenius == pytest.approx((12 * each["a"].frobenius + 5 * each["b"].frobenius) / 17, rel=1e-12)
    assert measures.weight_norms(tensors[0])[1]["b"].largest == pytest.approx(abs(end["b"]).max())
    with pytest.raises(DataError, match="b"):
        measures.weight_norms(tensors[0], {"a": tensors[1]["a"]})
    with pytest.raises(DataError, match="no weights"):
        measures.weight_norms({})
