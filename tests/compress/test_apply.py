import subprocess
import sys

import pytest
import torch

from tests.compress.specs import SHAPE, SPECS
from tests.reference.compress_dense import dense_matrix, gradient_from_factors
from vestige.compress import (
    BlockSizes,
    CompressingSink,
    adjoint_gradient,
    combine,
    compress_factors,
    compress_gradient,
    parse_spec,
    reduce_factor,
)
from vestige.gradients import FactorSink, OneHot


def _factors(examples=5, tokens=6, shape=SHAPE, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(examples, tokens, shape[0], generator=generator, dtype=torch.float64)
    right = torch.randn(examples, tokens, shape[1], generator=generator, dtype=torch.float64)
    return left.to(dtype), right.to(dtype)


def _build(spec, shape=SHAPE, name="layer", seed=0):
    return parse_spec(spec).build(name, shape, seed)


@pytest.mark.parametrize("spec", SPECS)
def test_factors_and_gradients_agree_with_one_dense_matrix(spec):
    compressor = _build(spec)
    left, right = _factors()
    gradient = gradient_from_factors(left, right)
    expected = gradient.flatten(1) @ dense_matrix(compressor).t()
    assert compressor.size == expected.shape[1] == parse_spec(spec).size_for(SHAPE)
    torch.testing.assert_close(compress_factors(compressor, left, right), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(compress_gradient(compressor, gradient), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", SPECS)
def test_adjoint_gradient_is_the_transposed_matrix(spec):
    compressor = _build(spec)
    compressed = torch.randn(4, compressor.size, generator=torch.Generator().manual_seed(0)).double()
    expected = (compressed @ dense_matrix(compressor)).unflatten(1, SHAPE)
    torch.testing.assert_close(adjoint_gradient(compressor, compressed), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", SPECS)
def test_one_hot_factors_equal_dense_ones(spec):
    compressor = _build(spec)
    _, right = _factors()
    ids = torch.tensor([[0, 1, 1, 8, 3, 3]] * 4 + [[2, 2, 2, 2, 2, 2]])
    dense = torch.nn.functional.one_hot(ids, SHAPE[0]).double()
    torch.testing.assert_close(
        compress_factors(compressor, OneHot(ids, SHAPE[0]), right),
        compress_factors(compressor, dense, right),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("length", [1, 5, 200])
def test_vectors_are_matrices_with_one_column(spec, length):
    compressor = _build(spec, (length, 1))
    left, right = _factors(shape=(length, 1), tokens=1)
    gradient = gradient_from_factors(left, right)
    assert compressor.size == parse_spec(spec).size_for((length, 1)) <= length
    expected = gradient.flatten(1) @ dense_matrix(compressor).t()
    torch.testing.assert_close(compress_factors(compressor, left, right), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("shape", [(2, 3), (1, 40), (40, 1), (3, 2)])
def test_no_stage_ever_expands(spec, shape):
    compressor = _build(spec, shape)
    assert compressor.size == parse_spec(spec).size_for(shape) <= shape[0] * shape[1]
    gradient = gradient_from_factors(*_factors(shape=shape))
    assert compress_gradient(compressor, gradient).shape == (5, compressor.size)


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec != "none"])
def test_a_layer_narrower_than_the_spec_is_kept_whole_with_scale_one(spec):
    compressor = _build(spec, (2, 3))
    gradient = gradient_from_factors(*_factors(shape=(2, 3)))
    if compressor.size == 6:
        torch.testing.assert_close(compress_gradient(compressor, gradient), gradient.flatten(1))
    else:
        assert compressor.size >= 4 or "3x3" in spec


def test_narrow_on_one_side_only():
    compressor = _build("mask:4x5", (9, 2))
    gradient = gradient_from_factors(*_factors(shape=(9, 2)))
    kept = compressor.left.index
    expected = (gradient[:, kept] * (9 / 4) ** 0.5).flatten(1)
    torch.testing.assert_close(compress_gradient(compressor, gradient), expected)


@pytest.mark.parametrize(
    ("shape", "size"),
    [((64, 64), 40), ((170, 170), 400), ((9, 13), 40)],
    ids=["gathered", "by entry", "from the product"],
)
def test_entrywise_mask_is_the_mask_of_the_materialised_gradient(shape, size, monkeypatch):
    monkeypatch.setattr(BlockSizes, "cpu_numbers", 1000)
    compressor = _build(f"mask:{size}", shape)
    assert compressor.product == "entrywise"
    left, right = _factors(shape=shape)
    flat = gradient_from_factors(left, right).flatten(1)
    kept = compressor.left.index * shape[1] + compressor.right.index
    assert len(set(kept.tolist())) == size
    expected = flat[:, kept] * (flat.shape[1] / size) ** 0.5
    torch.testing.assert_close(compress_factors(compressor, left, right), expected)


@pytest.mark.parametrize("spec", SPECS)
def test_bounded_memory_changes_nothing(spec, monkeypatch):
    compressor = _build(spec, (64, 64))
    left, right = _factors(shape=(64, 64))
    ids = torch.randint(64, (5, 6), generator=torch.Generator().manual_seed(0))
    whole = compress_factors(compressor, left, right), compress_factors(compressor, OneHot(ids, 64), right)
    monkeypatch.setattr(BlockSizes, "product_bytes", 2 * 4 * 64 * 64)
    monkeypatch.setattr(BlockSizes, "cpu_numbers", 4 * 24)  # a few tokens, less than an example
    parts = compress_factors(compressor, left, right), compress_factors(compressor, OneHot(ids, 64), right)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("spec", SPECS)
def test_an_example_is_compressed_alike_in_any_batch(spec):
    compressor = _build(spec)
    left, right = _factors(dtype=torch.float32)
    whole = compress_factors(compressor, left, right)
    for row in range(len(left)):
        alone = compress_factors(compressor, left[row : row + 1], right[row : row + 1])
        torch.testing.assert_close(alone[0], whole[row], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", SPECS)
def test_padding_changes_nothing(spec):
    compressor = _build(spec)
    left, right = _factors(dtype=torch.float32)
    longer = torch.cat([left, torch.zeros_like(left)], 1), torch.cat([right, 100 * right], 1)
    torch.testing.assert_close(
        compress_factors(compressor, *longer), compress_factors(compressor, left, right), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spec", ["none", "mask:4x5", "tensorsketch:24", "mask:40", "gauss:24", "sjlt:24"])
def test_tokens_in_half_precision_are_summed_in_float32(spec, dtype):
    compressor = _build(spec)
    left, right = torch.ones(1, 5000, SHAPE[0], dtype=dtype), torch.ones(1, 5000, SHAPE[1], dtype=dtype)
    compressed = compress_factors(compressor, left, right)
    assert compressed.dtype == torch.float32
    once = compress_factors(compressor, left[:, :1].float(), right[:, :1].float())
    torch.testing.assert_close(compressed, 5000 * once, rtol=0.01, atol=1.0)


@pytest.mark.parametrize("spec", SPECS)
def test_seed_name_and_nothing_else_decide(spec):
    torch.manual_seed(0)
    first = dense_matrix(_build(spec))
    torch.manual_seed(1)
    _build(spec, name="another layer")
    assert torch.equal(first, dense_matrix(_build(spec)))
    if spec != "none":
        assert not torch.equal(first, dense_matrix(_build(spec, seed=1)))
        assert not torch.equal(first, dense_matrix(_build(spec, name="another layer")))


@pytest.mark.slow
def test_another_process_builds_the_same_bytes():
    program = (
        "import sys, torch; from vestige.compress import parse_spec, compress_gradient;"
        "g = torch.eye(117).unflatten(1, (9, 13));"
        "print([compress_gradient(parse_spec(s).build('a', (9, 13), 3), g).numpy().tobytes().hex()[:400] "
        "for s in sys.argv[1:]])"
    )
    gradient = torch.eye(117).unflatten(1, SHAPE)
    chosen = ["mask:4x5 | sjlt:10", "gauss:24", "tensorsketch:24"]
    here = [
        compress_gradient(_build(spec, name="a", seed=3), gradient).numpy().tobytes().hex()[:400] for spec in chosen
    ]
    there = subprocess.run([sys.executable, "-c", program, *chosen], capture_output=True, text=True, check=True)
    assert there.stdout.strip() == str(here)


def test_stages_and_sides_of_one_component_are_independent():
    """Published seeds of the input mask and the projector coincided."""
    compressor = _build("mask:16x16 | logra:8x8", (16 * 4, 16 * 4))
    masks = compressor.left.maps[0].index, compressor.right.maps[0].index
    assert not torch.equal(*masks)
    matrices = compressor.left.maps[1].matrix, compressor.right.maps[1].matrix
    agreement = torch.corrcoef(torch.stack([one.flatten() for one in matrices]))[0, 1]
    assert abs(float(agreement)) < 4.5 / 128**0.5


class TestSink:
    def _sink(self, specs, shapes):
        compressors = [
            _build(spec, shape, f"layer {n}") for n, (spec, shape) in enumerate(zip(specs, shapes, strict=True))
        ]
        starts, width = [], 0
        for one in compressors:
            starts.append(width)
            width += one.size
        return CompressingSink(compressors, starts, width), compressors, starts

    def test_it_is_a_factor_sink(self):
        sink: FactorSink = CompressingSink([], [], 0)
        assert callable(sink.reduce)

    def test_columns_uses_and_example_slices_add_up(self):
        shapes = [SHAPE, (9, 1), (12, 5)]
        sink, compressors, starts = self._sink(["mask:4x5 | sjlt:10", "none", "tensorsketch:24"], shapes)
        sink.begin(5, "cpu")
        expected = torch.zeros(5, sink.width, dtype=torch.float64)
        for use, (part, component) in enumerate(
            [(slice(0, 5), 0), (slice(0, 2), 1), (slice(2, 5), 1), (slice(0, 5), 2), (slice(1, 3), 2)]
        ):
            left, right = _factors(part.stop - part.start, shape=shapes[component], dtype=torch.float32, seed=use)
            kept = sink.reduce(component, "left", left), sink.reduce(component, "right", right)
            sink.accumulate(component, part, *kept)
            columns = slice(starts[component], starts[component] + compressors[component].size)
            gradient = gradient_from_factors(left, right)
            expected[part, columns] += gradient.flatten(1) @ dense_matrix(compressors[component]).t()
        assert sink.gradients.dtype == torch.float32
        torch.testing.assert_close(sink.gradients.double(), expected, rtol=1e-4, atol=1e-4)

    def test_begin_forgets_the_last_batch(self):
        sink, _, _ = self._sink(["none"], [(3, 2)])
        sink.begin(2, "cpu")
        sink.accumulate(0, slice(0, 2), torch.ones(2, 1, 3), torch.ones(2, 1, 2))
        sink.begin(1, "cpu")
        assert sink.gradients.tolist() == [[0.0] * 6]

    def test_shared_columns_hold_the_sketch_of_the_whole_model(self):
        compressors = [_build("sjlt:24", SHAPE, name) for name in ("a", "b")]
        sink = CompressingSink(compressors, [0, 0], 24)
        sink.begin(5, "cpu")
        expected = torch.zeros(5, 24)
        for component, compressor in enumerate(compressors):
            left, right = _factors(dtype=torch.float32, seed=component)
            kept = sink.reduce(component, "left", left), sink.reduce(component, "right", right)
            sink.accumulate(component, slice(0, 5), *kept)
            expected += combine(compressor, *kept)
        torch.testing.assert_close(sink.gradients, expected)

    def test_a_tensor_sketch_never_keeps_more_than_the_activation(self):
        left, right = _factors()
        assert reduce_factor(_build("tensorsketch:7"), "right", right).shape == (5, 6, 7)
        assert reduce_factor(_build("tensorsketch:13"), "right", right) is right
        assert reduce_factor(_build("tensorsketch:24"), "left", left) is left

    def test_a_mask_shrinks_what_is_kept_of_the_forward_pass(self):
        compressor = _build("mask:4x5 | sjlt:10")
        left, right = _factors()
        assert reduce_factor(compressor, "right", right).shape == (5, 6, 5)
        assert reduce_factor(compressor, "left", left).shape == (5, 6, 4)
