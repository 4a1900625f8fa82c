"""One shard: four or five tensors in a safetensors file, and a marker that is written last and says it is whole.

The safetensors file is written and read here rather than by its library for three reasons: it is hashed while it is
written, a full disk is seen as the error it is, and the body is mapped into memory without a copy.
"""

import hashlib
import json
import mmap
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vestige.errors import CorruptFile, NonFinite
from vestige.files import remove_durably, sha256_of, write_durably
from vestige.index._manifest import SCALED_TYPES, Expectation, StoredType

_NAMES = {
    torch.int64: "I64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int8: "I8",
}
_TYPES = {name: dtype for dtype, name in _NAMES.items()}
_STORED = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "int8": torch.int8}
_PIECE_NUMBERS = 2**21
"""Numbers rounded at once: a shard is never held twice."""
_SMALLEST_EXPONENT = -126


class ShardContent(NamedTuple):
    """What is computed for one shard, rows in the order of the plan."""

    gradients: Float[Tensor, "row column"]
    """Compressed gradients, float32."""
    loss: Float[Tensor, "row"]
    norm: Float[Tensor, "row"]
    """Euclidean norm of each row before it is rounded for storing."""
    example: Int[Tensor, "row"]
    """Position of each row's example in the data."""


class StoredRows(NamedTuple):
    """A shard as it lies on disk: every tensor is a view of the mapped file."""

    gradients: Tensor
    loss: Tensor
    norm: Tensor
    example: Tensor
    scale: Tensor | None = None
    """What each row was divided by; None where it was not."""

    def decode(self, start: int, result: Float[Tensor, "row column"]) -> None:
        """Put the rows from `start` on, as many as `result` has, into `result` as float32."""
        # Piece by piece, so that the multiplication finds its numbers in the cache.
        step = max(2**16 // result.shape[1], 1)
        for first in range(0, len(result), step):
            piece, rows = result[first : first + step], slice(start + first, start + min(first + step, len(result)))
            piece.copy_(self.gradients[rows])
            if self.scale is not None:
                piece.mul_(self.scale[rows, None])

    def picked(self, rows: Int[Tensor, "row"]) -> Float[Tensor, "row column"]:
        """The given rows of this shard as float32."""
        result = self.gradients[rows].float()
        return result if self.scale is None else result * self.scale[rows, None]


class Marker(NamedTuple):
    """What `00012.json` says about `00012.safetensors`."""

    shard: int
    rows: int
    bytes: int
    sha256: str
    input: str
    """Fingerprint of everything that decides the shard's content."""
    vestige: str
    torch: str
    skipped: tuple[int, ...] = ()
    """Rows of the data whose loss or gradient was not finite, and which hold zeros; in the file only if there are."""


def shard_path(folder: Path, number: int) -> Path:
    """Where shard `number` keeps its tensors."""
    return folder / "shards" / f"{number:05d}.safetensors"


def marker_path(folder: Path, number: int) -> Path:
    """Where shard `number` keeps its marker."""
    return folder / "shards" / f"{number:05d}.json"


def write_shard(
    folder: Path,
    number: int,
    content: ShardContent,
    dtype: StoredType,
    expected: Expectation,
    name_of: Callable[[int], str] = "row {}".format,
    *,
    skip_bad: bool = False,
) -> Marker:
    """Shard `number` is on disk, whole, and then marked so.

    Args:
        folder: The index; its `shards` folder must exist.
        number: Which shard.
        content: Its rows.
        dtype: How to store the gradients.
        expected: What the manifest says about the shard.
        name_of: How to name the example at a row of the data in an error.
        skip_bad: Store zeros for an example whose loss or gradient is not finite, and list it in the marker.

    Raises:
        NonFinite: A loss or a gradient is NaN or infinite, and `skip_bad` is off; nothing was written.
        DiskSpaceError: The disk is full; nothing is left behind.
    """
    largest = _largest(content)
    skipped: tuple[int, ...] = ()
    if skip_bad and (skipped := tuple(content.example[~_is_finite(content, largest)].tolist())):
        content = _with_zeros(content, _is_finite(content, largest))
        largest = _largest(content)
    _require_finite(content, largest, name_of)
    # A marker of an earlier, damaged file must not vouch for the new one while that is being written.
    if marker_path(folder, number).exists():
        remove_durably(marker_path(folder, number))
    written = write_durably(shard_path(folder, number), _encoded(content, largest, dtype))
    made_by = version("vestige"), str(torch.__version__)
    marker = Marker(number, expected.rows, written.bytes, written.sha256, expected.input, *made_by, skipped)
    fields = {name: value for name, value in marker._asdict().items() if skipped or name != "skipped"}
    text = json.dumps(fields, indent=1) + "\n"
    write_durably(marker_path(folder, number), [text.encode()])
    return marker


def read_marker(folder: Path, number: int) -> Marker | None:
    """The marker of a shard, None if there is none or it does not read."""
    try:
        fields = json.loads(marker_path(folder, number).read_bytes())
        return Marker(**(fields | {"skipped": tuple(fields.get("skipped", ()))}))
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def shard_fault(folder: Path, number: int, expected: Expectation, *, contents: bool) -> str | None:
    """Why a shard does not count as done, None if it does.

    Args:
        folder: The index.
        number: Which shard.
        expected: What the manifest says about it.
        contents: Also compare the sha256, which reads the whole file.
    """
    marker, path = read_marker(folder, number), shard_path(folder, number)
    if marker is None:
        return "torn marker" if marker_path(folder, number).exists() else "missing"
    if not path.exists():
        return "marked as done, and its tensors are gone"
    if (marker.rows, marker.input) != expected:
        return "made from other data or settings"
    size = path.stat().st_size
    if size != marker.bytes:
        return f"truncated: {size:,} of {marker.bytes:,} bytes" if size < marker.bytes else "too long"
    if contents and sha256_of(path) != marker.sha256:
        return "altered: its sha256 is not the one in the marker"
    return None


def map_shard(folder: Path, number: int) -> StoredRows:
    """The tensors of a shard as views of the memory-mapped file: nothing is read before it is used.

    Raises:
        CorruptFile: The file is not a shard.
    """
    path = shard_path(folder, number)
    try:
        with path.open("rb") as file:
            # A private mapping: torch wants writable memory, and what is written there never reaches the file.
            body = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        size = int.from_bytes(body[:8], "little")
        header: dict[str, Any] = json.loads(body[8 : 8 + size])
        header.pop("__metadata__", None)
        tensors = {name: _view(body, 8 + size, entry) for name, entry in header.items()}
        return StoredRows(**tensors)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise CorruptFile(
            f"{path} does not read as a shard ({error}). Run the same vestige index command again to rebuild it."
        ) from error


def _view(body: mmap.mmap, start: int, entry: dict[str, Any]) -> Tensor:
    dtype, shape = _TYPES[entry["dtype"]], entry["shape"]
    first, last = entry["data_offsets"]
    count = torch.Size(shape).numel()
    if count * dtype.itemsize != last - first or start + last > len(body):
        raise ValueError(f"a tensor of shape {shape} does not fit its place")
    return torch.frombuffer(body, dtype=dtype, count=count, offset=start + first).view(shape)


def _largest(content: ShardContent) -> Float[Tensor, "row"]:
    return torch.linalg.vector_norm(content.gradients, ord=float("inf"), dim=1)


def _is_finite(content: ShardContent, largest: Float[Tensor, "row"]) -> Tensor:
    return torch.isfinite(content.loss) & torch.isfinite(largest) & torch.isfinite(content.norm)


def _with_zeros(content: ShardContent, keep: Tensor) -> ShardContent:
    """The content with every number of the other rows zero: a product with NaN would still be NaN."""
    gradients = torch.where(keep[:, None], content.gradients, 0.0)
    return ShardContent(
        gradients, torch.where(keep, content.loss, 0.0), torch.where(keep, content.norm, 0.0), content.example
    )


def _require_finite(content: ShardContent, largest: Tensor, name_of: Callable[[int], str]) -> None:
    for what, values in (("loss", content.loss), ("gradient", largest), ("gradient norm", content.norm)):
        bad = content.example[~torch.isfinite(values)].tolist()
        if bad:
            names = ", ".join(name_of(row) for row in bad[:10]) + (", ..." if len(bad) > 10 else "")
            raise NonFinite(
                f"The {what} of {len(bad)} example{'s' * (len(bad) > 1)} is NaN or infinite: {names}. "
                "Look at these texts, try --precision float32, leave them out of the data, or type --skip-bad."
            )


def _encoded(content: ShardContent, largest: Tensor, dtype: StoredType) -> Iterator[bytes | memoryview]:
    """The safetensors file, piece by piece; the tensors in the order of their alignment, as its library does."""
    scale = _scales(largest, dtype)
    rows, columns = content.gradients.shape
    small = {"example": content.example.to(torch.int64), "loss": content.loss.float()}
    small["norm"] = content.norm.float()
    if scale is not None:
        small["scale"] = scale
    shapes = {name: (tensor.dtype, [rows]) for name, tensor in small.items()}
    shapes["gradients"] = (_STORED[dtype], [rows, columns])
    yield safetensors_header(shapes, {"axes": "gradients: row column"})
    for tensor in small.values():
        yield _bytes_of(tensor)
    step = max(_PIECE_NUMBERS // columns, 1)
    for first in range(0, rows, step):
        piece = content.gradients[first : first + step].float()
        if scale is not None:
            piece = piece / scale[first : first + step, None]
        yield _bytes_of(piece.round().to(torch.int8) if dtype == "int8" else piece.to(_STORED[dtype]))


def _scales(largest: Float[Tensor, "row"], dtype: StoredType) -> Float[Tensor, "row"] | None:
    """What each row is divided by before it is rounded.

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


def safetensors_header(shapes: dict[str, tuple[torch.dtype, list[int]]], metadata: dict[str, str]) -> bytes:
    """What stands before the tensors of a safetensors file, which follow in the order of `shapes`."""
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, (dtype, shape) in shapes.items():
        end = offset + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes_of(tensor: Tensor) -> memoryview:
    # numpy knows no bfloat16; as plain bytes every dtype passes.
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data


def content_digest(markers: list[Marker]) -> str:
    """sha256 over the sha256 of every shard: what a result that was computed from an index can be keyed by."""
    return hashlib.sha256("".join(marker.sha256 for marker in markers).encode()).hexdigest()
