import random

import numpy as np
import pytest
import scipy.stats
import torch

from vestige.compress import Stream, bits, gaussians, integers, permutation, permutation_head, signs

COUNT = 1 << 16


def test_bits_do_not_depend_on_the_batch_they_are_drawn_in():
    stream = Stream(3, "layer", 0)
    whole = bits(stream, torch.arange(1000))
    parts = torch.cat([bits(stream, torch.arange(start, start + 100)) for start in range(0, 1000, 100)])
    shuffled = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(whole, parts)
    assert torch.equal(whole[shuffled], bits(stream, shuffled))


def test_bits_are_pinned():
    """A change of the hash would silently invalidate every index on disk."""
    assert bits(Stream(0, "pinned"), torch.tensor([0, 1, 2**32, 2**40 + 5])).tolist() == [
        3838455344,
        1178792016,
        2409124955,
        4085851488,
    ]


@pytest.mark.parametrize("start", [0, 2**32 - COUNT // 2, 7 * 2**32])
def test_every_bit_is_even_and_independent_of_its_neighbours(start):
    words = bits(Stream(1, "uniform"), torch.arange(start, start + COUNT)).numpy()
    table = (words[:, None] >> np.arange(32)) & 1
    spread = np.abs(table.mean(0) - 0.5) / (0.5 / COUNT**0.5)
    assert spread.max() < 4.5
    agreement = np.corrcoef(table.T) - np.eye(32)
    assert np.abs(agreement).max() < 5 / COUNT**0.5
    assert np.abs(np.mean((table[1:] == table[:-1]), 0) - 0.5).max() < 4.5 * 0.5 / COUNT**0.5


def test_words_are_uniform():
    words = bits(Stream(1, "chi"), torch.arange(COUNT)).numpy()
    counts = np.bincount(words >> 24, minlength=256)
    assert scipy.stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize("other", [Stream(1, "b"), Stream(2, "a"), Stream(1, "a", 0), Stream(1, "a", "0")])
def test_streams_are_independent(other):
    first, second = (signs(one, torch.arange(COUNT)) for one in (Stream(1, "a"), other))
    assert abs(float((first * second).mean())) < 4.5 / COUNT**0.5
    for shift in (1, 2, 64):
        assert abs(float((first[shift:] * second[:-shift]).mean())) < 4.5 / COUNT**0.5


def test_keys_of_many_streams_are_distinct():
    """Published software derived seeds by adding offsets, and the mask and the projector got the same one."""
    keys = {
        Stream(seed, f"layers.{layer}", stage, name, side).keys
        for seed in range(5)
        for layer in range(20)
        for stage in range(3)
        for name in ("mask", "sjlt")
        for side in ("left", "right", "whole")
    }
    assert len(keys) == 5 * 20 * 3 * 2 * 3


def test_path_parts_do_not_run_together():
    assert Stream(1, "a", "b").keys != Stream(1, "ab").keys
    assert Stream(1, "a/b").keys != Stream(1, "a", "b").keys


def test_gaussians_are_standard_normal():
    numbers = gaussians(Stream(0, "normal"), torch.arange(COUNT)).numpy()
    assert numbers.dtype == np.float32
    assert scipy.stats.kstest(numbers, "norm").pvalue > 1e-4
    assert abs(scipy.stats.kurtosis(numbers)) < 0.1


@pytest.mark.parametrize("limit", [3, 256, 4096, 1_000_003])
def test_integers_cover_their_range_evenly(limit):
    numbers = integers(Stream(0, "integers"), torch.arange(COUNT), limit).numpy()
    assert numbers.min() >= 0
    assert numbers.max() < limit
    counts = np.bincount(numbers * min(limit, 64) // limit, minlength=min(limit, 64))
    assert scipy.stats.chisquare(counts).pvalue > 1e-4


def test_permutation_head_is_a_sorted_uniform_subset():
    hits = np.zeros(50)
    for seed in range(400):
        head = permutation_head(Stream(seed, "head"), 10, 50)
        assert head.tolist() == sorted(set(head.tolist()))
        assert len(head) == 10
        hits[head.numpy()] += 1
    assert abs(hits - 80).max() < 4.5 * (400 * 0.2 * 0.8) ** 0.5


def test_permutation_head_of_a_range_longer_than_one_block():
    whole = permutation_head(Stream(1, "long"), 37, 1000)
    assert torch.equal(whole, permutation_head(Stream(1, "long"), 37, 1000, block=64))


def test_heads_are_nested():
    small, large = (set(permutation_head(Stream(1, "nest"), count, 1000).tolist()) for count in (30, 100))
    assert small < large


def test_permutation_holds_every_coordinate_once():
    order = permutation(Stream(2, "order"), 1000)
    assert order.sort().values.tolist() == list(range(1000))
    assert order.tolist() != list(range(1000))


def test_global_generators_are_left_alone():
    """Published software re-seeded torch's global generator at each draw."""
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    gaussians(Stream(0, "x"), torch.arange(10))
    permutation_head(Stream(0, "x"), 3, 10)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]
