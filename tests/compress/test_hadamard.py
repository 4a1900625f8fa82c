"""The fast Walsh-Hadamard transform and the sketch made of it."""

import pytest
import torch
from scipy.linalg import hadamard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.reference.compress_dense import matrix_of
from vestige.compress import Stream, compress_factors, fjlt, parse_spec, walsh_hadamard


@pytest.mark.parametrize("size", [1, 2, 4, 8, 64, 512])
def test_the_transform_is_the_hadamard_matrix(size):
    vectors = torch.randn(3, size, generator=torch.Generator().manual_seed(0)).double()
    given = vectors.clone()
    expected = vectors @ torch.tensor(hadamard(size)).double()
    torch.testing.assert_close(walsh_hadamard(vectors), expected)
    assert torch.equal(vectors, given)


def test_twice_the_transform_is_the_size():
    vectors = torch.randn(2, 1 << 12, generator=torch.Generator().manual_seed(0))
    twice = walsh_hadamard(walsh_hadamard(vectors)) / (1 << 12)
    torch.testing.assert_close(twice, vectors, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("in_size", "out_size"), [(31, 7), (32, 31), (33, 33), (64, 64), (1, 1)])
def test_every_entry_is_a_sign_over_the_root_of_k_and_rows_are_orthogonal_where_nothing_is_padded(in_size, out_size):
    matrix = matrix_of(fjlt(in_size, out_size, Stream(0, "a")))
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, out_size**-0.5), rtol=1e-6, atol=0)
    if in_size & (in_size - 1) == 0:
        gram = matrix @ matrix.t() * out_size / in_size
        torch.testing.assert_close(gram, torch.eye(out_size).double(), rtol=0, atol=1e-6)


def test_with_all_rows_of_a_power_of_two_nothing_is_lost():
    sketch = fjlt(64, 64, Stream(0, "a"))
    vectors = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(sketch.apply(vectors) @ sketch.apply(vectors).t(), vectors @ vectors.t())


@pytest.mark.parametrize("cached", [1, 1 << 10, 1 << 18])
def test_an_example_is_the_same_to_the_last_bit_in_any_batch(cached, monkeypatch):
    sketch = fjlt(300, 50, Stream(0, "a"))
    monkeypatch.setattr(type(sketch), "cached_numbers", cached)
    vectors = torch.randn(7, 300, generator=torch.Generator().manual_seed(0))
    whole, back = sketch.apply(vectors), sketch.adjoint(vectors[:, :50])
    for row in range(7):
        assert torch.equal(sketch.apply(vectors[row]), whole[row])
        assert torch.equal(sketch.adjoint(vectors[row, :50]), back[row])


def test_one_large_coordinate_is_spread_over_all_numbers():
    """What a mask or a count sketch cannot do: no coordinate can be missed, none can hide another."""
    compressor = parse_spec("fjlt:16").build("a", (30, 20), 0)
    left, right = torch.zeros(1, 1, 30), torch.zeros(1, 1, 20)
    left[0, 0, 13], right[0, 0, 5] = 2.0, 3.0
    torch.testing.assert_close(compress_factors(compressor, left, right).abs(), torch.full((1, 16), 6 / 4))


class NumbersWritten(TorchDispatchMode):
    """Counts the numbers that operations on tensors write."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        self.count += sum(each.numel() for each in tree_leaves(result) if isinstance(each, torch.Tensor))
        return result


def test_the_cost_grows_like_n_log_n():
    """16 times the coordinates cost 21 times as much; a dense matrix of as many rows would cost 256 times."""
    written = {}
    for size in (1 << 12, 1 << 16):
        sketch, vectors = fjlt(size, size // 2, Stream(0, "a")), torch.ones(4, size)
        with NumbersWritten() as numbers:
            sketch.apply(vectors)
        written[size] = numbers.count
    assert 16 < written[1 << 16] / written[1 << 12] < 16 * 16 / 12 + 1
