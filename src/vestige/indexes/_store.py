"""A finished index: opened, scanned block by block with the next one read ahead, looked up by row, verified."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, final

import numpy as np
from jaxtyping import Float, Int

from vestige.data import StoredExamples
from vestige.errors import CorruptFile, UserError
from vestige.indexes._examples import examples_paths, read_lengths
from vestige.indexes._manifest import Manifest, Span, expect_shards, read_manifest, require_index
from vestige.indexes._shards import Marker, StoredRows, map_shard, read_marker, shard_fault, shard_path
from vestige.lazy import torch
from vestige.timing import count_bytes, time_phase

if TYPE_CHECKING:
    from torch import Tensor

BLOCK_BYTES = 4 * 2**20
"""Gradients in float32 that are read at once, unless a row alone has more; about three times as many are in memory."""


_Span = tuple[int, slice]
"""A shard, and rows of it."""


class IndexBlock(NamedTuple):
    """A few consecutive rows of an index."""

    example: Int[Tensor, "row"]
    """Positions of the rows' examples in the data."""
    gradients: Float[Tensor, "row column"]
    """Compressed gradients, float32; the caller's own to change."""
    loss: Float[Tensor, "row"]
    norm: Float[Tensor, "row"]
    """Euclidean norm of each gradient before it was rounded for storing."""


class ShardFault(NamedTuple):
    """A shard that does not count as done, and why."""

    number: int
    reason: str


@final
class Index:
    """The compressed gradients of a data set on disk, one row per example.

    Rows lie in the order of the shard plan (longest examples first), which `IndexBlock.example` maps to the data.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest

    @classmethod
    def open(cls, folder: str | Path, *, allow_missing: bool = False) -> Index:
        """Open the index in `folder`; the shards' sizes are checked, their contents are not (see `verify`).

        Args:
            folder: Where `vestige index` wrote it.
            allow_missing: Also open one that is not finished, to list what is missing.

        Raises:
            UserError: There is no index, or it is not finished; the message contains how to continue.
            CorruptFile: Its manifest does not read.
        """
        folder = Path(folder)
        require_index(folder)
        manifest = read_manifest(folder)
        assert manifest is not None
        index = cls(folder, manifest)
        if not allow_missing and (missing := index.missing_shards()):
            raise UserError(
                f"The index in {folder} is not finished: {len(missing)} of {len(manifest.shard_rows)} shards are "
                "missing. Run the command that began it again with the same settings; it computes only these:\n"
                f"  vestige index --model {manifest.model.name} --data {manifest.data.name} --out {folder} ..."
            )
        return index

    @property
    def rows(self) -> int:
        """Number of rows: one per example."""
        return sum(self.manifest.shard_rows)

    @property
    def width(self) -> int:
        """Number of columns."""
        return self.manifest.width

    def columns(self, number: int) -> slice:
        """Return the columns of component `number`; all of them when the whole model was compressed into one vector."""
        component = self.manifest.components[number]
        return slice(component.start, component.stop)

    @property
    def spans(self) -> tuple[Span, ...]:
        """Columns that hold one compressed gradient each: a component's, or the sum of all components'."""
        return self.manifest.spans

    def blocks(self, max_bytes: int = BLOCK_BYTES, *, shards: range | None = None) -> Iterator[IndexBlock]:
        """Yield every row once, in the order of the plan, while the next block is being read in the background.

        Args:
            max_bytes: Most bytes of float32 gradients per block (one row may exceed it). About three blocks are in
                memory; small ones stay in the processor's cache.
            shards: Only the rows of these shards.
        """
        step, sizes = max(max_bytes // (4 * self.width), 1), self.manifest.shard_rows
        spans = [
            (shard, slice(start, min(start + step, sizes[shard])))
            for shard in (range(len(sizes)) if shards is None else shards)
            for start in range(0, sizes[shard], step)
        ]
        buffers = _Buffers(self.width * min(step, max(self.manifest.shard_rows)))
        return _read_ahead(partial(self._read, buffers), spans)

    def shard_groups(self, max_bytes: int) -> list[range]:
        """Group consecutive shards by at most `max_bytes` of stored gradients, a larger shard by itself.

        The pieces of work on an index: they follow from the index alone, never from the processes that work on them.
        """
        groups, size = [range(0)], 0
        for shard, rows in enumerate(self.manifest.shard_rows):
            size += rows * self.manifest.row_bytes
            if groups[-1] and size > max_bytes:
                groups.append(range(shard, shard))
                size = rows * self.manifest.row_bytes
            groups[-1] = range(groups[-1].start, shard + 1)
        return groups

    def rows_of(self, shards: range) -> int:
        """Return the number of rows in these shards."""
        return sum(self.manifest.shard_rows[shards.start : shards.stop])

    def gradients_of(self, rows: Sequence[int] | np.ndarray | Int[Tensor, "row"]) -> Float[Tensor, "row column"]:
        """Return the gradients of the examples at `rows` of the data, float32, in the requested order.

        Raises:
            IndexError: A row is not in the data.
        """
        wanted = np.asarray(rows, dtype=np.int64).reshape(-1)
        if len(wanted) and (wanted.min() < 0 or wanted.max() >= self.rows):
            raise IndexError(f"rows {wanted.min()} to {wanted.max()} were requested of {self.rows} examples")
        places = self._places[wanted].astype(np.int64) - 1
        ends = np.cumsum(self.manifest.shard_rows)
        shards = np.searchsorted(ends, places, side="right")
        result = torch.empty((len(wanted), self.width), dtype=torch.float32)
        for shard in np.unique(shards).tolist():
            chosen = np.flatnonzero(shards == shard)
            inside = places[chosen] - (ends[shard] - self.manifest.shard_rows[shard])
            result[torch.from_numpy(chosen)] = self._shard(shard).pick(torch.from_numpy(inside))
        return result

    def losses_and_norms(self) -> tuple[Float[Tensor, "row"], Float[Tensor, "row"]]:
        """Return loss and gradient norm of every example, in the order of the data."""
        loss, norm = torch.empty(self.rows), torch.empty(self.rows)
        for number in range(len(self.manifest.shard_rows)):
            stored = self._shard(number)
            loss[stored.example], norm[stored.example] = stored.loss, stored.norm
        return loss, norm

    def missing_shards(self) -> list[int]:
        """Return the numbers of the shards without a marker, or whose file has not the size in its marker."""
        return [fault.number for fault in self._faults(contents=False)]

    def verify(self) -> list[ShardFault]:
        """Return the shards that are missing or whose sha256 is not their marker's; reads every byte.

        Raises:
            CorruptFile: The shards are whole, but do not hold each example once.
        """
        faults = self._faults(contents=True)
        if not faults:
            _ = self._places
        return faults

    def examples(self) -> StoredExamples:
        """Return the examples in row order of the data: a sequence that reads each when it is requested."""
        return self._stored_examples

    def lengths(self) -> np.ndarray:
        """Return the tokens per example, int64 [example]."""
        return read_lengths(self.folder, self.manifest)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the content of all shards: what a result computed from this index can be kept under."""
        return hashlib.sha256("".join(marker.sha256 for marker in self._markers).encode()).hexdigest()

    @cached_property
    def skipped(self) -> tuple[int, ...]:
        """Rows of the data whose loss or gradient was not finite; their gradients are zero (`--skip-bad`)."""
        return tuple(sorted(row for marker in self._markers for row in marker.skipped))

    @property
    def left_out(self) -> list[str]:
        """Ids of the examples at the skipped rows."""
        return [self.examples()[row].id for row in self.skipped]

    @cached_property
    def _markers(self) -> list[Marker]:
        markers = (read_marker(self.folder, number) for number in range(len(self.manifest.shard_rows)))
        return [marker for marker in markers if marker is not None]

    @cached_property
    def _stored_examples(self) -> StoredExamples:
        return StoredExamples(examples_paths(self.folder, self.manifest))

    @cached_property
    def _places(self) -> np.ndarray:
        """One more than where each example's row lies among all stored rows, int32 or int64 [example]."""
        places = np.zeros(self.rows, np.int32 if self.rows < np.iinfo(np.int32).max else np.int64)
        first = 0
        for number, count in enumerate(self.manifest.shard_rows):
            rows = self._shard(number).example.numpy()
            known = np.flatnonzero((rows >= 0) & (rows < self.rows))
            places[rows[known]] = first + known + 1
            first += count
        # There are as many rows as examples: if every example has one, none has two.
        if not places.all():
            raise CorruptFile(
                f"The shards of {self.folder} do not hold each of {self.rows} examples once. "
                "Build the index again: run its vestige index command with --overwrite."
            )
        return places

    def _shard(self, number: int) -> StoredRows:
        stored, expected = map_shard(self.folder, number), (self.manifest.shard_rows[number], self.width)
        if stored.gradients.shape != expected:
            raise CorruptFile(
                f"{shard_path(self.folder, number)} holds gradients of shape {tuple(stored.gradients.shape)}, and the "
                f"manifest records {expected}. Build the index again: run its vestige index command with --overwrite."
            )
        return stored

    def _read(self, buffers: _Buffers, span: _Span) -> IndexBlock:
        stored, rows = self._shard(span[0]), span[1]
        count = rows.stop - rows.start
        gradients = buffers.take()[: count * self.width].view(count, self.width)
        stored.decode(rows.start, gradients)
        count_bytes("read", count * self.manifest.row_bytes)
        # Copies, so that a block that is kept does not keep its shard's file mapped.
        return IndexBlock(stored.example[rows].clone(), gradients, stored.loss[rows].clone(), stored.norm[rows].clone())

    def _faults(self, *, contents: bool) -> list[ShardFault]:
        return [
            ShardFault(number, reason)
            for number, expected in enumerate(expect_shards(self.manifest))
            if (reason := shard_fault(self.folder, number, expected, contents=contents))
        ]


@final
class _Buffers:
    """Memory for blocks, used again when the block that lay there is released.

    Fresh memory would cost several times as much as filling it, because the system clears every page first.
    """

    _MOST = 3
    """One block with the caller, one ready, one being read."""
    _FREE_COUNT = 3
    """References to an array that only the list, the loop and the counting itself hold."""

    def __init__(self, numbers: int) -> None:
        self._numbers = numbers
        self._arrays: list[np.ndarray] = []

    def take(self) -> Float[Tensor, "number"]:
        """Return a float32 tensor whose memory no other living tensor or array shares."""
        for array in self._arrays:
            # Every tensor over an array's memory, views too, holds a reference to the array.
            if sys.getrefcount(array) == self._FREE_COUNT:
                return torch.from_numpy(array)
        array = np.empty(self._numbers, dtype=np.float32)
        if len(self._arrays) < self._MOST:
            self._arrays.append(array)
        return torch.from_numpy(array)


def _read_ahead(read: Callable[[_Span], IndexBlock], spans: list[_Span]) -> Iterator[IndexBlock]:
    def wait(coming: Future[IndexBlock]) -> IndexBlock:
        with time_phase("reading"):
            return coming.result()

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="vestige-read") as reader:
        coming: Future[IndexBlock] | None = None
        for span in spans:
            ready, coming = coming, reader.submit(read, span)
            if ready is not None:
                yield wait(ready)
                # The finished future would keep the block's memory from being used again.
                del ready
        if coming is not None:
            yield wait(coming)


def parts_in_order(index: Index, rows: int | None = None) -> Iterator[tuple[slice, Float[Tensor, "row column"]]]:
    """Yield consecutive rows of the data and their gradients, `rows` at a time; not given: as many as fit in 16 MB."""
    step = rows or max(16 * 2**20 // (4 * index.width), 1)
    for start in range(0, index.rows, step):
        part = slice(start, min(start + step, index.rows))
        yield part, index.gradients_of(np.arange(part.start, part.stop))
