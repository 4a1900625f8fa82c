"""Secrets and texts that come back word for word."""

import math

import numpy as np
import pytest
import torch

from tests.architectures import build
from tests.reference import audit as reference
from vestige import measures
from vestige.errors import DataError, SpecError


def test_edit_distance_is_levenshteins():
    draw = np.random.default_rng(0)
    for _ in range(50):
        one, other = (tuple(draw.integers(0, 3, draw.integers(0, 8)).tolist()) for _ in range(2))
        assert measures.edit_distance(one, other) == reference.edit_distance(one, other)


def test_all_prefixes_are_judged_on_the_same_continuation():
    asked = []

    def parrot(prefix, count):
        asked.append(prefix.tolist())
        return prefix[:, -1:] + 1 + torch.arange(count) * (prefix.shape[1] > 1)

    found = measures.extraction([np.arange(10), np.arange(4)], parrot, prefixes=(1, 3), continuation=4)
    assert asked == [[[2]], [[0, 1, 2]]]
    np.testing.assert_array_equal(found.similarity, [[0.25, math.nan], [1.0, math.nan]])
    np.testing.assert_array_equal(found.exact, [[False, False], [True, False]])
    assert [rate.value for rate in found.rates()] == [0.0, 1.0]
    assert [rate.value for rate in found.rates(0.25)] == [1.0, 1.0]
    with pytest.raises(SpecError, match="lengths"):
        measures.extraction([np.arange(10)], parrot, prefixes=())


def test_greedy_takes_the_most_likely_token_each_time():
    model = build("llama", torch.float64)
    prefix = torch.tensor([[1, 5, 3], [2, 2, 7]])
    found = measures.greedy(model)(prefix, 6)
    tokens = prefix
    for _ in range(6):
        with torch.no_grad():
            tokens = torch.cat([tokens, model(input_ids=tokens).logits[:, -1:].argmax(-1)], dim=1)
    assert found.tolist() == tokens[:, 3:].tolist()


def test_a_text_that_a_model_was_drilled_on_is_extracted():
    model = build("llama", torch.float32).train()
    text = torch.arange(16)[None] * 3 % 7
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimiser.zero_grad()
        model(input_ids=text, labels=text).loss.backward()
        optimiser.step()
    found = measures.extraction([text[0].numpy()], measures.greedy(model.eval()), prefixes=(8,), continuation=8)
    assert found.exact.all()


def test_exposure_is_the_rank_in_bits():
    candidates = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
    found = measures.exposure(np.array([0.5, 4.5, 9.0, 1.0, np.nan]), candidates)
    np.testing.assert_allclose(found, [3.0, 3 - math.log2(5), 0.0, 3 - math.log2(1.5), math.nan])
    draw = np.random.default_rng(0)
    by_chance = np.mean([measures.exposure(draw.random(1), draw.random(500))[0] for _ in range(2000)])
    assert by_chance == pytest.approx(1 / math.log(2), abs=0.1)
    with pytest.raises(DataError, match="0 candidates"):
        measures.exposure(np.ones(1), np.ones(0))
