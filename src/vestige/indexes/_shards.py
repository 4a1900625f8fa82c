"""One shard: four or five tensors in a safetensors file, and a marker that is written last when it is whole.

Its rows go to the disk part by part as they are computed, in a thread of their own while the next ones are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, final

import numpy as np
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open

from vestige.data import send
from vestige.errors import CorruptFile, NonFinite
from vestige.indexes._manifest import SCALED_TYPES, Expectation, StoredType
from vestige.lazy import torch
from vestige.parsing import read_record
from vestige.storage import NewFile, remove_durably, sha256_of, sha256_once
from vestige.timing import count_bytes, time_phase

if TYPE_CHECKING:
    from torch import Tensor

PART_BYTES = 2**21
"""Gradients in float32 that are in memory at once while a shard is made, unless a batch alone has more."""
TYPE_NAMES = {"int64": "I64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "I8"}
"""Names of number formats in safetensors, by their names in torch."""
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


def parts_of(
    batches: Sequence[np.ndarray], width: int, *, fewest: int = 1, most_bytes: int = PART_BYTES
) -> Iterator[tuple[int, Iterator[np.ndarray]]]:
    """Yield the batches of a shard in parts: the examples of each, and its batches, all to be taken before the next.

    Args:
        batches: Those of a shard, gone through once; the parts follow from their sizes alone.
        width: Columns of a row.
        fewest: At least as many batches are in a part, while there are more: each process of a group has one.
        most_bytes: Most bytes of a part's gradients in float32, unless a batch alone has more.
    """
    # Reading a batch by its number does not count it as done.
    sizes = [len(batches[number]) for number in range(len(batches))]
    most, coming, first = max(most_bytes // (4 * width), 1), iter(batches), 0
    while first < len(sizes):
        last, rows = first + 1, sizes[first]
        while last < len(sizes) and (last - first < fewest or rows + sizes[last] <= most):
            last, rows = last + 1, rows + sizes[last]
        yield rows, islice(coming, last - first)
        first = last
    # The last batch is done when the next one is requested.
    next(coming, None)


def _encode(
    content: ShardContent, dtype: StoredType, name_of: Callable[[int], str], skip_bad: bool
) -> tuple[dict[str, Tensor], Iterator[memoryview], tuple[int, ...]]:
    """Return rows as they are stored: the small tensors, the gradients' bytes piece by piece, rows that hold zeros."""
    largest = _largest(content)
    skipped: tuple[int, ...] = ()
    fields = {"loss": content.loss, "gradient": largest, "gradient norm": content.norm}
    finite = torch.stack([torch.isfinite(values) for values in fields.values()]).all(0)
    if skip_bad and (skipped := tuple(content.example[~finite].tolist())):
        # Every number of the row becomes zero: a product with NaN would still be NaN.
        kept = torch.where(finite[:, None], content.gradients, 0.0)
        loss, norm = (torch.where(finite, values, 0.0) for values in (content.loss, content.norm))
        content = ShardContent(kept, loss, norm, content.example)
        largest = _largest(content)
    for what, values in fields.items() if not skip_bad else ():
        if bad := content.example[~torch.isfinite(values)].tolist():
            raise NonFinite.of_examples(what, list(map(name_of, bad)))
    small = {"example": content.example.to(torch.int64), "loss": content.loss.float(), "norm": content.norm.float()}
    scale = _scales(largest, dtype)
    if scale is not None:
        small["scale"] = scale
    return small, _round(content.gradients, scale, dtype), skipped


def safetensors_header(shapes: dict[str, tuple[torch.dtype, list[int]]], metadata: dict[str, str]) -> bytes:
    """Return what stands before the tensors of a safetensors file, which follow in the order of `shapes`."""
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, (dtype, shape) in shapes.items():
        end = offset + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {
            "dtype": TYPE_NAMES[str(dtype).removeprefix("torch.")],
            "shape": shape,
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return the tensor's memory."""
    # numpy knows no bfloat16; as plain bytes every dtype passes.
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data


def _round(gradients: Tensor, scale: Float[Tensor, "row"] | None, dtype: StoredType) -> Iterator[memoryview]:
    step = max(_PIECE_NUMBERS // gradients.shape[1], 1)
    for first in range(0, len(gradients), step):
        piece = gradients[first : first + step].float()
        if scale is not None:
            piece = piece / scale[first : first + step, None]
        yield _bytes_of(piece.round().to(torch.int8) if dtype == "int8" else piece.to(getattr(torch, dtype)))


def _largest(content: ShardContent) -> Float[Tensor, "row"]:
    return torch.linalg.vector_norm(content.gradients, ord=float("inf"), dim=1)


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


_ORDER = ("example", "loss", "norm", "scale", "gradients")
"""Tensors of a shard in the order in which they lie there."""


class StoredRows(NamedTuple):
    """A shard as it lies on disk: every tensor is a view of the mapped file."""

    gradients: Tensor
    loss: Tensor
    norm: Tensor
    example: Tensor
    scale: Tensor | None = None
    """What each row was divided by; None where it was not."""

    def decode(self, rows: slice, device: torch.device | str = "cpu") -> Float[Tensor, "row column"]:
        """Return consecutive rows of this shard as float32, in memory of their own on a device."""
        # On the way to a card they are as they are stored: fewer bytes.
        found = send(self.gradients[rows], device).to(torch.float32, copy=True)
        return found if self.scale is None else found.mul_(send(self.scale[rows, None], device))

    def pick(self, rows: Int[Tensor, "row"]) -> Float[Tensor, "row column"]:
        """Return the given rows of this shard as float32."""
        result = self.gradients[rows].float()
        return result if self.scale is None else result * self.scale[rows, None]


class Marker(NamedTuple):
    """Content of `00012.json`, the marker of `00012.safetensors`."""

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
    device: str = "cpu"
    """As in the manifest; in the file only if it is another."""


def shard_path(folder: Path, number: int) -> Path:
    """Return the path of the tensors of shard `number`."""
    return folder / "shards" / f"{number:05d}.safetensors"


MISSING = "missing"
"""Fault of a shard without a marker."""


def marker_path(folder: Path, number: int) -> Path:
    """Return the path of the marker of shard `number`."""
    return folder / "shards" / f"{number:05d}.json"


@final
@dataclass
class ShardFile:
    """One shard in the making: use it as a context, and put its parts there in their order.

    When the context ends well the shard is on the disk, whole, and marked as done; else nothing is left of it.
    """

    folder: Path
    """The index; its `shards` folder must exist."""
    number: int
    dtype: StoredType
    """How to store the gradients."""
    expected: Expectation
    name_of: Callable[[int], str] = "row {}".format
    """Names the example at a row of the data in an error."""
    skip_bad: bool = False
    """Store zeros for an example whose loss or gradient is not finite, and list it in the marker."""
    device: str = "cpu"
    """What computes it, as in the manifest."""
    _small: dict[str, list[Tensor]] = field(default_factory=dict)
    _skipped: list[int] = field(default_factory=list)
    _header: bytes = b""

    def __enter__(self) -> ShardFile:
        self._file = NewFile(shard_path(self.folder, self.number)).__enter__()
        return self

    def put(self, part: ShardContent) -> None:
        """Round the part's rows and write them.

        Raises:
            NonFinite: A loss or a gradient is NaN or infinite, and `skip_bad` is off.
            DiskSpaceError: The disk is full.
        """
        small, pieces, skipped = _encode(part, self.dtype, self.name_of, self.skip_bad)
        self._skipped += skipped
        start = None
        if not self._header:
            shapes = {name: (tensor.dtype, [self.expected.rows]) for name, tensor in small.items()}
            before = sum(dtype.itemsize * self.expected.rows for dtype, _ in shapes.values())
            shapes["gradients"] = (getattr(torch, self.dtype), [self.expected.rows, part.gradients.shape[1]])
            self._header = safetensors_header(shapes, {"axes": "gradients: row column"})
            # The small tensors lie before the gradients and are known after them.
            start = len(self._header) + before
        for name, tensor in small.items():
            self._small.setdefault(name, []).append(tensor)
        for piece in pieces:
            self._file.write(piece, start)
            start = None

    def __exit__(self, *error: Any) -> None:
        if error[0] is not None:
            self._file.__exit__(*error)
            return
        path = marker_path(self.folder, self.number)
        fault = shard_fault(self.folder, self.number, self.expected, contents=False)
        if fault is None:
            # Another process has written the same shard by now. Replaced, it would not count for a moment, and the
            # other process may be looking.
            self._file.__exit__(FileExistsError)
            return
        with ExitStack() as stack:
            stack.push(self._file)
            start = 0
            for chunk in (self._header, *(_bytes_of(torch.cat(tensors)) for tensors in self._small.values())):
                self._file.write(chunk, start)
                start += len(chunk)
            digest = self._file.sha256()
            # A marker of an earlier, damaged file must not vouch for the new one.
            if fault != MISSING:
                remove_durably(path)
        made_by = version("vestige"), str(torch.__version__)
        size, (rows, made_from) = self._file.size, self.expected
        marker = Marker(self.number, rows, size, digest, made_from, *made_by, tuple(self._skipped), self.device)
        usual = Marker._field_defaults
        fields = {name: value for name, value in marker._asdict().items() if name not in usual or value != usual[name]}
        with NewFile(path) as file:
            file.write((json.dumps(fields, indent=1) + "\n").encode())
        count_bytes("written", size)


@final
class ShardWriter:
    """Writes shards while the next ones are computed; the context ends when the last is on the disk."""

    def __init__(self) -> None:
        # One writes a part of a shard while the other brings the shard before to the disk.
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="vestige-write")
        self._last: list[Future[None]] = []

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._threads.shutdown()
        if kind is None:
            _wait(self._last)

    def write(self, shard: ShardFile, parts: Iterable[ShardContent]) -> None:
        """Write a shard, part by part as they are computed, each in memory of its own; its end may follow later.

        Raises:
            UserError: One that `ShardFile` raises, for this shard or the one before.
        """
        steps = list[Future[None]]()
        with ExitStack() as stack:
            stack.enter_context(shard)
            # An error must not close the file while a thread writes to it.
            stack.callback(wait, steps)
            for part in parts:
                # Two parts are in memory: this one, and the one before until it is written.
                _wait(steps[-1:])
                steps.append(self._threads.submit(shard.put, part))
            _wait(steps[-1:])
            stack.pop_all()
        before, self._last = self._last, [self._threads.submit(shard.__exit__, None)]
        _wait(before)


def _wait(steps: list[Future[None]]) -> None:
    with time_phase("writing"):
        for step in steps:
            step.result()


def read_marker(folder: Path, number: int) -> Marker | None:
    """Return the marker of a shard, None if there is none or it does not read."""
    return read_record(Marker, marker_path(folder, number))


def shard_fault(folder: Path, number: int, expected: Expectation, *, contents: bool) -> str | None:
    """Return why a shard does not count as done, None if it does.

    Args:
        folder: The index.
        number: Which shard.
        expected: What the manifest records about it.
        contents: Also compare the sha256, which reads the whole file.
    """
    marker, path = read_marker(folder, number), shard_path(folder, number)
    if marker is None:
        return "torn marker" if marker_path(folder, number).exists() else MISSING
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


def map_shard(folder: Path, number: int, *, checked: bool = True) -> StoredRows:
    """Return the tensors of a shard as views of the memory-mapped file: nothing is read before it is used.

    Args:
        folder: The index.
        number: Which shard.
        checked: Compare its sha256 with the marker's, which reads the whole file, once per process.

    Raises:
        CorruptFile: The file is not a shard, or not the one that was written.
    """
    path = shard_path(folder, number)
    try:
        marker = read_marker(folder, number)
        if checked and (marker is None or marker.sha256 != sha256_once(path)):
            raise ValueError("its sha256 is not the one in its marker")
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.offset_keys()}
        if list(found) != [name for name in _ORDER if name in found]:
            raise ValueError(f"it holds the tensors {', '.join(found)}, expected {', '.join(_ORDER)} in this order")
        stored = StoredRows(**found)
        if len({len(tensor) for tensor in found.values()}) > 1:
            raise ValueError("its tensors have different numbers of rows")
        return stored
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise CorruptFile(
            f"{path} is not the shard that was written ({error}). Run the same vestige index command again: "
            f"it makes this shard again. All files: vestige status --verify {folder}"
        ) from error
