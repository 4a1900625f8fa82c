"""One shard: four or five tensors in a safetensors file, and a marker that is written last when it is whole.

The safetensors file is written and read here rather than by its library for three reasons: it is hashed while it is
written, a full disk is reported as the error it is, and the body is mapped into memory without a copy.
"""

import hashlib
import json
import mmap
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vestige.errors import CorruptFile
from vestige.files import remove_durably, sha256_of, sha256_once, write_durably, write_error
from vestige.indexes._content import TYPE_NAMES, ShardContent, bytes_of, encoded, shard_header
from vestige.indexes._manifest import Expectation, StoredType
from vestige.parsing import as_record, parse_json, parse_object
from vestige.timing import timed

_TYPES = {name: dtype for dtype, name in TYPE_NAMES.items()}
_ORDER = ("example", "loss", "norm", "scale", "gradients")
"""Tensors of a shard in the order in which they lie there."""
_HELD_BYTES = 2**21
"""Rounded gradients of a shard in the making that are in memory; those of a larger one lie on the disk."""


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


def shard_path(folder: Path, number: int) -> Path:
    """Return the path of the tensors of shard `number`."""
    return folder / "shards" / f"{number:05d}.safetensors"


def marker_path(folder: Path, number: int) -> Path:
    """Return the path of the marker of shard `number`."""
    return folder / "shards" / f"{number:05d}.json"


def write_shard(
    folder: Path,
    number: int,
    parts: Iterable[ShardContent],
    dtype: StoredType,
    expected: Expectation,
    name_of: Callable[[int], str] = "row {}".format,
    *,
    skip_bad: bool = False,
) -> Marker:
    """Write shard `number`, whole, and then mark it as done.

    Args:
        folder: The index; its `shards` folder must exist.
        number: Which shard.
        parts: Its rows, of which one part after another is computed, rounded and put aside.
        dtype: How to store the gradients.
        expected: What the manifest records about the shard.
        name_of: How to name the example at a row of the data in an error.
        skip_bad: Store zeros for an example whose loss or gradient is not finite, and list it in the marker.

    Raises:
        NonFinite: A loss or a gradient is NaN or infinite, and `skip_bad` is off; nothing was written.
        DiskSpaceError: The disk is full; nothing is left behind.
    """
    small: dict[str, list[Tensor]] = {}
    skipped: list[int] = []
    columns = 0
    path = shard_path(folder, number)
    with _open_aside(path) as gradients:
        for part in parts:
            rows, columns = encoded(part, dtype, name_of, skip_bad=skip_bad), part.gradients.shape[1]
            for name, tensor in rows.small.items():
                # A copy: what is computed next may lie in the same memory.
                small.setdefault(name, []).append(tensor.clone())
            for piece in rows.gradients:
                _put_aside(gradients, piece, path)
            skipped += rows.skipped
        whole = {name: torch.cat(tensors) for name, tensors in small.items()}
        # A marker of an earlier, damaged file must not vouch for the new one while that is being written.
        if marker_path(folder, number).exists():
            remove_durably(marker_path(folder, number))
        header = [shard_header(whole, columns, dtype), *map(bytes_of, whole.values())]
        gradients.seek(0)
        written = write_durably(path, chain(header, iter(partial(gradients.read, 2**20), b"")))
    made_by = version("vestige"), str(torch.__version__)
    marker = Marker(number, expected.rows, written.bytes, written.sha256, expected.input, *made_by, tuple(skipped))
    fields = {name: value for name, value in marker._asdict().items() if skipped or name != "skipped"}
    text = json.dumps(fields, indent=1) + "\n"
    write_durably(marker_path(folder, number), [text.encode()])
    return marker


@contextmanager
def _open_aside(path: Path) -> "Iterator[tempfile.SpooledTemporaryFile[bytes]]":
    """Open a file without a name, first in memory and then beside `path`: it is gone with the process."""
    file = tempfile.SpooledTemporaryFile(max_size=_HELD_BYTES, dir=str(path.parent))  # noqa: SIM115
    try:
        yield file
    finally:
        # What did not fit on the disk would be tried again, and is no longer needed.
        with suppress(OSError):
            file.close()


def _put_aside(file: "tempfile.SpooledTemporaryFile[bytes]", piece: bytes | memoryview, path: Path) -> None:
    try:
        with timed("writing"):
            file.write(memoryview(piece).cast("B"))
            file.flush()
    except OSError as error:
        raise write_error(error, path, file.tell()) from error


def read_marker(folder: Path, number: int) -> Marker | None:
    """Return the marker of a shard, None if there is none or it does not read."""
    try:
        return as_record(Marker, parse_object(marker_path(folder, number).read_bytes()))
    except (OSError, ValueError):
        return None


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
        with path.open("rb") as file:
            # A private mapping: torch wants writable memory, and what is written there never reaches the file.
            body = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        size = int.from_bytes(body[:8], "little")
        header: dict[str, Any] = parse_json(body[8 : 8 + size])
        header.pop("__metadata__", None)
        return StoredRows(**_views(body, 8 + size, header))
    except (OSError, ArithmeticError, ValueError, TypeError, LookupError, RuntimeError, AttributeError) as error:
        raise CorruptFile(
            f"{path} is not the shard that was written ({error}). Run the same vestige index command again: "
            f"it makes this shard again. All files: vestige status --verify {folder}"
        ) from error


def _views(body: mmap.mmap, start: int, header: dict[str, Any]) -> dict[str, Tensor]:
    """Return the tensors that the header names, if they fill the file in the order in which they are written."""
    names = [name for name in _ORDER if name in header]
    if list(header) != names:
        raise ValueError(f"it holds the tensors {', '.join(header)}, expected {', '.join(_ORDER)} in this order")
    found, offset = {}, 0
    for name, entry in header.items():
        dtype, shape = _TYPES[entry["dtype"]], entry["shape"]
        size = torch.Size(shape).numel() * dtype.itemsize
        if min(shape) < 0 or entry["data_offsets"] != [offset, offset + size] or start + offset + size > len(body):
            raise ValueError(f"the tensor {name} of shape {shape} does not fit its position")
        found[name] = torch.frombuffer(body, dtype=dtype, count=size // dtype.itemsize, offset=start + offset).view(
            shape
        )
        offset += size
    if start + offset != len(body):
        raise ValueError("it is too long")
    rows = {name: len(tensor) for name, tensor in found.items()}
    if len(set(rows.values())) > 1:
        raise ValueError(f"its tensors have different numbers of rows: {rows}")
    return found


def content_digest(markers: list[Marker]) -> str:
    """Return the sha256 of the sha256 of every shard: what a result computed from an index can be keyed by."""
    return hashlib.sha256("".join(marker.sha256 for marker in markers).encode()).hexdigest()
