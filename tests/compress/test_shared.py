"""One sketch of the whole model: the sum of what all components leave in the same columns."""

import numpy as np
import pytest
import torch

from tests.reference.compress_dense import gradient_from_factors, matrix_of
from vestige.compress import CompressingSink, compress_gradient, parse_spec
from vestige.errors import SpecError

SHAPES = {"wide": (9, 13), "square": (5, 5), "bias": (9, 1), "scale": (2, 1), "single": (1, 1)}
SHARED = [
    "sjlt:16",
    "sjlt:16,s=3",
    "gauss:16",
    "rademacher:16",
    "mask:4x5 | sjlt:16",
    "mask:60 | gauss:16",
    "logra:6x6 | sjlt:16",
    "tensorsketch:40 | sjlt:16",
    "fjlt:40 | rademacher:16",
    "sjlt:200",
]


def _gradients():
    """Two gradients of the whole model, tiny components as large as the others in norm, with a cosine of a half."""
    generator = torch.Generator().manual_seed(3)
    parts = {}
    for name, shape in SHAPES.items():
        part = torch.randn(2, *shape, generator=generator).double()
        part[1] += 0.6 * part[0]
        parts[name] = part / part.flatten(1).norm(dim=1)[:, None, None]
    return parts


def _summed(spec, parts, seed, shared=True):
    parsed = parse_spec(spec)
    images = [
        compress_gradient(parsed.build(name, tuple(part.shape[1:]), seed, shared=shared), part)
        for name, part in parts.items()
    ]
    return sum(images[1:], start=images[0])


@pytest.mark.slow
@pytest.mark.parametrize("spec", SHARED)
def test_the_summed_sketch_of_the_whole_gradient_is_unbiased(spec):
    parts = _gradients()
    exact = sum(float((part[0] * part[1]).sum()) for part in parts.values())
    sketches = [_summed(spec, parts, seed) for seed in range(150)]
    estimates = np.array([float(one[0] @ one[1]) for one in sketches])
    assert abs(estimates.mean() - exact) <= 3 * estimates.std(ddof=1) / 150**0.5


@pytest.mark.slow
def test_kept_as_they_are_tiny_components_would_collide():
    """Why the last stage is never skipped: identities of two biases meet with the same sign in every sketch."""
    parts = {name: torch.ones(2, *SHAPES[name]).double() for name in ("scale", "single")}
    skipped = [parse_spec("sjlt:16").build(name, SHAPES[name], 0) for name in parts]
    assert [one.size for one in skipped] == [2, 1]
    sketch = torch.zeros(2, 16).double()
    for one, part in zip(skipped, parts.values(), strict=True):
        sketch[:, : one.size] += compress_gradient(one, part)
    assert float(sketch[0] @ sketch[1]) == 5.0  # 2 + 1 and a cross term of 2 that no seed can change
    estimates = [float(image[0] @ image[1]) for image in (_summed("sjlt:16", parts, seed) for seed in range(150))]
    assert abs(np.mean(estimates) - 3.0) <= 3 * np.std(estimates) / 150**0.5


@pytest.mark.parametrize("spec", SHARED)
def test_every_component_fills_all_columns(spec):
    parsed = parse_spec(spec)
    size = parsed.stages[-1].size[0]
    for name, shape in SHAPES.items():
        compressor = parsed.build(name, shape, 0, shared=True)
        assert compressor.size == parsed.size_for(shape, shared=True) == size


@pytest.mark.slow
def test_cross_terms_of_two_components_vanish_on_average():
    one, other = torch.randn(2, 117, generator=torch.Generator().manual_seed(0)).double()
    products = []
    for seed in range(200):
        left, right = (
            compress_gradient(parse_spec("sjlt:16").build(name, (9, 13), seed, shared=True), part.view(1, 9, 13))
            for name, part in (("a", one), ("b", other))
        )
        products.append(float((left * right).sum()))
    assert abs(np.mean(products)) <= 3 * np.std(products) / 200**0.5
    assert np.std(products) > 0


@pytest.mark.parametrize("spec", ["sjlt:16", "mask:6x8 | gauss:16"])
def test_a_component_wider_than_the_sketch_gets_the_map_it_gets_alone(spec):
    alone, shared = (parse_spec(spec).build("a", (9, 13), 0, shared=shared) for shared in (False, True))
    assert torch.equal(matrix_of(alone.tail), matrix_of(shared.tail))


@pytest.mark.parametrize(
    "spec", ["none", "mask:16", "mask:4x5", "logra:16", "logra:4x4", "tensorsketch:16", "fjlt:16", "sjlt:4x4"]
)
def test_a_last_stage_that_cannot_be_shared_is_refused(spec):
    for refused in (
        lambda: parse_spec(spec).build("a", (9, 13), 0, shared=True),
        lambda: parse_spec(spec).size_for((9, 13), shared=True),
    ):
        with pytest.raises(SpecError, match=r"cannot be summed over the whole model.*random signs.*sjlt:K"):
            refused()


def test_a_sink_adds_components_of_any_width():
    parsed = parse_spec("mask:4x5 | sjlt:16")
    compressors = [parsed.build(name, shape, 0, shared=True) for name, shape in SHAPES.items()]
    sink = CompressingSink(compressors, [0] * len(compressors), 16)
    sink.begin(3, "cpu")
    generator = torch.Generator().manual_seed(0)
    parts = {}
    for number, (name, shape) in enumerate(SHAPES.items()):
        left, right = (torch.randn(3, 4, side, generator=generator) for side in shape)
        kept = sink.reduce(number, "left", left), sink.reduce(number, "right", right)
        sink.accumulate(number, slice(0, 3), *kept)
        parts[name] = gradient_from_factors(left, right)
    torch.testing.assert_close(sink.gradients.double(), _summed("mask:4x5 | sjlt:16", parts, 0), rtol=1e-4, atol=1e-4)
