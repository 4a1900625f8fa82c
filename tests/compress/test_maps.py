import math

import pytest
import torch

from tests.reference.compress_dense import matrix_of
from vestige.compress import (
    Composed,
    Coordinates,
    Dense,
    Fold,
    Identity,
    Sjlt,
    Stream,
    StreamedDense,
    Wrap,
    chain,
    fjlt,
    logra,
    mask,
    random_columns,
    tensorsketch,
)

STREAM = Stream(0, "map")
SIZE = 31


def _sides(size: int) -> tuple[Fold, Fold]:
    return tensorsketch((SIZE, SIZE), size, STREAM)


MAPS = {
    "identity": Identity(SIZE),
    "mask": mask(SIZE, 7, STREAM),
    "unscaled mask": mask(SIZE, 7, STREAM, scale="none"),
    "repeated coordinates": Coordinates(SIZE, torch.tensor([4, 4, 0, 30, 4]), 1.5),
    "gaussian": logra(SIZE, 7, STREAM),
    "rademacher": logra(SIZE, 7, STREAM, init="rademacher"),
    "orthonormal": logra(SIZE, 7, STREAM, init="orthonormal"),
    "hadamard": fjlt(SIZE, 7, STREAM),
    "square hadamard": fjlt(32, 31, STREAM),
    "streamed": StreamedDense(SIZE, 7, STREAM, "gaussian", torch.device("cpu")),
    **{f"sjlt {s}": Sjlt(SIZE, 9, STREAM, s) for s in range(1, 10)},
    "sjlt with empty rows": Sjlt(SIZE, 200, STREAM, 1),
    "fold": _sides(7)[0],
    "permuted fold": _sides(7)[1],
    "wide fold": _sides(40)[1],
    "wrap": Wrap(5),
    "composed": Composed([mask(SIZE, 20, STREAM), logra(20, 5, STREAM)]),
}
maps = pytest.mark.parametrize("one", MAPS.values(), ids=MAPS.keys())


def _vectors(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


@maps
@pytest.mark.parametrize("batch", [(), (3,), (2, 4), (1, 1)])
def test_apply_is_the_dense_matrix_in_float64(one, batch):
    vectors = _vectors(*batch, one.in_size)
    image = one.apply(vectors)
    assert image.dtype == torch.float64
    torch.testing.assert_close(image, vectors @ matrix_of(one).t(), rtol=1e-6, atol=1e-6)


@maps
def test_adjoint_is_the_transposed_matrix(one):
    vectors, images = _vectors(5, one.in_size), _vectors(5, one.out_size)
    back = one.adjoint(images)
    torch.testing.assert_close(back, images @ matrix_of(one), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close((one.apply(vectors) * images).sum(), (vectors * back).sum())


@maps
def test_columns_are_the_images_of_unit_vectors(one):
    ids = torch.tensor([[0, one.in_size - 1], [1, 1]])
    unit = torch.nn.functional.one_hot(ids, one.in_size).to(torch.float32)
    torch.testing.assert_close(one.columns(ids), one.apply(unit))


@maps
def test_strides_do_not_matter(one):
    """A published CUDA kernel read non-contiguous input as if it were contiguous."""
    vectors = _vectors(6, one.in_size, 4)
    strided = vectors.transpose(1, 2)
    assert not strided.is_contiguous()
    torch.testing.assert_close(one.apply(strided), one.apply(strided.contiguous()))
    every_other = _vectors(3, 2 * one.in_size)[:, ::2]
    torch.testing.assert_close(one.apply(every_other), one.apply(every_other.contiguous()))


@maps
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_dtype_and_its_value(one, dtype):
    vectors = _vectors(8, one.in_size, dtype=dtype)
    image = one.apply(vectors)
    assert image.dtype == dtype
    exact = vectors.double() @ matrix_of(one).t()
    error = (image.double() - exact).norm() / exact.norm()
    assert error < (0.002 if dtype == torch.float16 else 0.01)


@maps
def test_moving_to_a_device_keeps_the_map(one):
    vectors = _vectors(2, one.in_size)
    assert torch.equal(one.to(torch.device("cpu")).apply(vectors), one.apply(vectors))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("entries", [1, 4])
def test_sjlt_accumulates_halves_in_float32(dtype, entries):
    """Adding 20,000 ones in half precision stops at 2048 (float16) or 256 (bfloat16)."""
    sketch = Sjlt(80_000, 4, STREAM, entries)
    rows, signs = sketch.nonzeros(torch.arange(80_000))
    vector = torch.zeros(80_000, dtype=dtype)
    vector[(rows[:, 0] == 0)] = 1.0
    vector = vector * signs[:, 0].sign().to(dtype)
    sum_of_ones = float((rows[:, 0] == 0).sum()) / math.sqrt(entries)
    assert float(sketch.apply(vector)[0]) == pytest.approx(sum_of_ones, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fold_accumulates_halves_in_float32(dtype):
    fold = Fold(20_000, torch.ones(20_000), torch.arange(2))
    assert float(fold.apply(torch.ones(20_000, dtype=dtype))[0]) == pytest.approx(10_000, rel=0.01)


@pytest.mark.parametrize("entries", [1, 2, 5, 8])
def test_sjlt_columns_have_length_one_and_distinct_rows(entries):
    columns = matrix_of(Sjlt(500, 17, STREAM, entries))
    torch.testing.assert_close(columns.norm(dim=0), torch.ones(500, dtype=torch.float64), rtol=0, atol=1e-6)
    assert ((columns != 0).sum(0) == entries).all()


def test_sparse_images_are_dense_images():
    ids = torch.tensor([[3, 3, 7, 30], [0, 1, 2, 29]])
    values = _vectors(2, 4)
    dense = torch.zeros(2, SIZE, dtype=torch.float64).scatter_add_(1, ids, values)
    for one in (Identity(SIZE), mask(SIZE, 11, STREAM), mask(SIZE, 1, STREAM), Sjlt(SIZE, 9, STREAM, 3)):
        torch.testing.assert_close(one.apply_sparse(ids, values), one.apply(dense))


def test_streamed_matrix_is_the_stored_matrix(monkeypatch):
    monkeypatch.setattr(StreamedDense, "block_entries", 50)
    for init in ("gaussian", "rademacher"):
        columns = random_columns(STREAM, init, torch.arange(SIZE), 7)
        streamed = StreamedDense(SIZE, 7, STREAM, init, torch.device("cpu"))
        stored = Dense(columns.t().contiguous())
        vectors = _vectors(3, SIZE)
        assert torch.equal(streamed.columns(torch.arange(SIZE)), columns)
        torch.testing.assert_close(streamed.apply(vectors), stored.apply(vectors))
        torch.testing.assert_close(streamed.adjoint(vectors[:, :7]), stored.adjoint(vectors[:, :7]))


def test_fold_is_balanced():
    """No row or column of a gradient may collide with itself before it is longer than K."""
    left, right = tensorsketch((96, 32), 32, STREAM)
    assert (matrix_of(left) != 0).sum(1).tolist() == [3] * 32
    assert (matrix_of(right) != 0).sum(1).tolist() == [1] * 32
    assert right.order.tolist() != list(range(32))


def test_chain_drops_identities():
    kept = mask(SIZE, 7, STREAM)
    assert chain(SIZE, [Identity(SIZE), kept, Identity(7)]) is kept
    assert isinstance(chain(SIZE, []), Identity)
    assert isinstance(chain(SIZE, [kept, logra(7, 3, STREAM)]), Composed)
