"""The content of a shard, computed part by part, and its bytes: no more than a part is in memory at a time."""

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vestige.errors import NonFinite
from vestige.indexes._manifest import SCALED_TYPES, StoredType

PART_BYTES = 2**21
"""Gradients in float32 that are in memory at once while a shard is made, unless a batch alone has more."""

TYPE_NAMES = {
    torch.int64: "I64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int8: "I8",
}
STORED = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "int8": torch.int8}
_PIECE_NUMBERS = 2**20
"""Numbers rounded at once."""
_SMALLEST_EXPONENT = -126


class ShardContent(NamedTuple):
    """Consecutive rows of a shard, in the order of the plan."""

    gradients: Float[Tensor, "row column"]
    """Compressed gradients, float32."""
    loss: Float[Tensor, "row"]
    norm: Float[Tensor, "row"]
    """Euclidean norm of each row before it is rounded for storing."""
    example: Int[Tensor, "row"]
    """Position of each row's example in the data."""


class PartBatches(NamedTuple):
    """Consecutive batches of a shard."""

    rows: int
    """Examples in them."""
    batches: Iterator[np.ndarray]
    """Rows of the data, batch after batch; all of them have to be taken before the next part is requested."""


def parts_of(batches: Sequence[np.ndarray], width: int, *, fewest: int = 1) -> Iterator[PartBatches]:
    """Yield the batches of a shard in parts of at most `PART_BYTES`; they follow from the batches' sizes alone.

    Args:
        batches: Those of a shard, gone through once.
        width: Columns of a row.
        fewest: As many batches are in a part in any case, while there are more: each process of a group has one.
    """
    # Reading a batch by its number does not count it as done.
    sizes = [len(batches[number]) for number in range(len(batches))]
    most, coming, first = max(PART_BYTES // (4 * width), 1), iter(batches), 0
    while first < len(sizes):
        last, rows = first + 1, sizes[first]
        while last < len(sizes) and (last - first < fewest or rows + sizes[last] <= most):
            last, rows = last + 1, rows + sizes[last]
        yield PartBatches(rows, islice(coming, last - first))
        first = last
    # The last batch is done when the next one is requested.
    next(coming, None)


class EncodedRows(NamedTuple):
    """Rows as they lie on disk: the small tensors, and the gradients as bytes, piece by piece."""

    small: dict[str, Tensor]
    """By name, in the order of the file."""
    gradients: Iterator[memoryview]
    skipped: tuple[int, ...]
    """Rows of the data that were not finite, and hold zeros."""


def encoded(content: ShardContent, dtype: StoredType, name_of: Callable[[int], str], *, skip_bad: bool) -> EncodedRows:
    """Return the rows as they are stored.

    Args:
        content: Some rows of a shard.
        dtype: How to store the gradients.
        name_of: How to name the example at a row of the data in an error.
        skip_bad: Zeros take the place of rows whose loss or gradient is not finite.

    Raises:
        NonFinite: A loss or a gradient is NaN or infinite, and `skip_bad` is off.
    """
    largest = _largest(content)
    skipped: tuple[int, ...] = ()
    if skip_bad and (skipped := tuple(content.example[~_is_finite(content, largest)].tolist())):
        content = _with_zeros(content, _is_finite(content, largest))
        largest = _largest(content)
    _require_finite(content, largest, name_of)
    small = {"example": content.example.to(torch.int64), "loss": content.loss.float(), "norm": content.norm.float()}
    scale = _scales(largest, dtype)
    if scale is not None:
        small["scale"] = scale
    return EncodedRows(small, _rounded(content.gradients, scale, dtype), skipped)


def shard_header(small: dict[str, Tensor], columns: int, dtype: StoredType) -> bytes:
    """Return what stands before the tensors of a shard: the small ones first, in the order of their alignment."""
    rows = len(small["example"])
    shapes = {name: (tensor.dtype, [rows]) for name, tensor in small.items()}
    shapes["gradients"] = (STORED[dtype], [rows, columns])
    return safetensors_header(shapes, {"axes": "gradients: row column"})


def safetensors_header(shapes: dict[str, tuple[torch.dtype, list[int]]], metadata: dict[str, str]) -> bytes:
    """Return what stands before the tensors of a safetensors file, which follow in the order of `shapes`."""
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, (dtype, shape) in shapes.items():
        end = offset + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": TYPE_NAMES[dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the tensor's memory."""
    # numpy knows no bfloat16; as plain bytes every dtype passes.
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data


def _rounded(gradients: Tensor, scale: Float[Tensor, "row"] | None, dtype: StoredType) -> Iterator[memoryview]:
    step = max(_PIECE_NUMBERS // gradients.shape[1], 1)
    for first in range(0, len(gradients), step):
        piece = gradients[first : first + step].float()
        if scale is not None:
            piece = piece / scale[first : first + step, None]
        yield bytes_of(piece.round().to(torch.int8) if dtype == "int8" else piece.to(STORED[dtype]))


def _largest(content: ShardContent) -> Float[Tensor, "row"]:
    return torch.linalg.vector_norm(content.gradients, ord=float("inf"), dim=1)


def _is_finite(content: ShardContent, largest: Float[Tensor, "row"]) -> Tensor:
    return torch.isfinite(content.loss) & torch.isfinite(largest) & torch.isfinite(content.norm)


def _with_zeros(content: ShardContent, keep: Tensor) -> ShardContent:
    """Return the content with every number of the other rows zero: a product with NaN would still be NaN."""
    gradients = torch.where(keep[:, None], content.gradients, 0.0)
    return ShardContent(
        gradients, torch.where(keep, content.loss, 0.0), torch.where(keep, content.norm, 0.0), content.example
    )


def _require_finite(content: ShardContent, largest: Tensor, name_of: Callable[[int], str]) -> None:
    for what, values in (("loss", content.loss), ("gradient", largest), ("gradient norm", content.norm)):
        bad = content.example[~torch.isfinite(values)].tolist()
        if bad:
            raise NonFinite.of_examples(what, list(map(name_of, bad)))


def _scales(largest: Float[Tensor, "row"], dtype: StoredType) -> Float[Tensor, "row"] | None:
    """Return what each row is divided by before it is rounded.

    For float16 a power of two that brings the largest entry to [2^14, 2^15): dividing by it is exact, nothing
    overflows, and entries down to 2^-28 of the largest keep full precision. For int8 the largest entry becomes 127.
    """
    if dtype not in SCALED_TYPES:
        return None
    smallest = 2.0**_SMALLEST_EXPONENT
    if dtype == "int8":
        scale = (largest.double() / 127).clamp_min(smallest).float()
    else:
        exponent = (torch.frexp(largest.double()).exponent - 15).clamp_min(_SMALLEST_EXPONENT)
        # A power of two is a float32 whose mantissa bits are zero: exact, unlike a call of pow.
        scale = ((exponent + 127) << 23).view(torch.float32)
    return torch.where(largest > 0, scale, torch.ones_like(scale))
