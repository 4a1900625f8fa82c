"""Inner products of compressed gradients: right on average, with an error that falls as 1 / sqrt(k)."""

import numpy as np
import pytest
import torch

from tests.compress.specs import SHAPE, SPECS
from tests.reference.compress_dense import gradient_from_factors
from vestige.compress import compress_gradient, parse_spec


def _pair(shape, tokens=4):
    """Two gradients with a cosine near one half."""
    generator = torch.Generator().manual_seed(5)
    left = torch.randn(2, tokens, shape[0], generator=generator).double()
    right = torch.randn(2, tokens, shape[1], generator=generator).double()
    gradient = gradient_from_factors(left, right)
    gradient[1] += 0.6 * gradient[0]
    return gradient


def _estimates(spec, gradient, seeds):
    parsed = parse_spec(spec)
    rows = [
        compress_gradient(parsed.build("layer", tuple(gradient.shape[1:]), seed), gradient) for seed in range(seeds)
    ]
    return np.array([float(one[0] @ one[1]) for one in rows])


def _exact(gradient):
    return float((gradient[0] * gradient[1]).sum())


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS)
def test_inner_products_are_unbiased_over_200_seeds(spec):
    gradient = _pair(SHAPE)
    estimates = _estimates(spec, gradient, 200)
    error = estimates.mean() - _exact(gradient)
    assert abs(error) <= 3 * estimates.std(ddof=1) / 200**0.5 + 1e-9 * abs(_exact(gradient))


@pytest.mark.parametrize("spec", ["mask:40", "mask:4x5", "mask:60 | sjlt:16", "mask:6x8 | tensorsketch:16"])
def test_the_published_unscaled_mask_is_the_scaled_one_shrunk_by_k_over_n(spec):
    """The published masks are not rescaled; the same draw, scaled, differs by exactly this factor."""
    head, *rest = spec.split(" | ")
    shrunk = " | ".join([f"{head},scale=none", *rest])
    sizes = [int(number) for number in head.removeprefix("mask:").split("x")]
    share = np.prod(sizes) / (SHAPE[0] * SHAPE[1])
    gradient = _pair(SHAPE)
    scaled, unscaled = (_estimates(one, gradient, 20) for one in (spec, shrunk))
    np.testing.assert_allclose(unscaled, scaled * share, rtol=1e-6)


@pytest.mark.slow
def test_the_published_unscaled_mask_is_biased():
    gradient = _pair(SHAPE)
    estimates = _estimates("mask:40,scale=none", gradient, 200)
    share = 40 / (SHAPE[0] * SHAPE[1])
    spread = estimates.std(ddof=1) / 200**0.5
    assert abs(estimates.mean() - share * _exact(gradient)) <= 3 * spread
    assert estimates.mean() < _exact(gradient) - 10 * spread


@pytest.mark.slow
@pytest.mark.parametrize("word", ["gauss", "rademacher", "sjlt", "tensorsketch", "mask", "mask:900 | sjlt"])
def test_error_falls_as_one_over_the_root_of_k(word):
    gradient = _pair((24, 40))
    scale = float(gradient[0].norm() * gradient[1].norm())
    sizes = np.array([8, 32, 128])
    errors = [
        np.sqrt(np.mean((_estimates(f"{word}:{size}", gradient, 60) - _exact(gradient)) ** 2)) / scale for size in sizes
    ]
    slope = np.polyfit(np.log(sizes), np.log(errors), 1)[0]
    assert -0.65 < slope < -0.35
    if not word.startswith("mask"):  # a mask sees heavy entries or misses them: same slope, larger constant
        assert all(error < 1.5 / size**0.5 for error, size in zip(errors, sizes, strict=True))


def test_tensorsketch_keeps_low_rank_gradients_where_kronecker_projection_loses_them():
    """At 64 numbers of a rank-one gradient, 8x8 projections multiply two errors of 1/sqrt(8) each."""
    gradient = _pair((32, 40), tokens=1)
    errors = {
        spec: np.sqrt(np.mean((_estimates(spec, gradient, 100) - _exact(gradient)) ** 2))
        for spec in ("tensorsketch:64", "logra:8x8")
    }
    assert errors["tensorsketch:64"] < 0.6 * errors["logra:8x8"]
