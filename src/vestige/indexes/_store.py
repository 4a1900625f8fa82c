"""A finished index: opened, scanned block by block with the next one read ahead, looked up by row, verified."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, final

import numpy as np
from jaxtyping import Float, Int

from vestige.data import StoredExamples, send
from vestige.errors import CorruptFile, UserError
from vestige.indexes._manifest import Manifest, Span, expect_shards, read_manifest, require_index
from vestige.indexes._plan import examples_paths, read_lengths
from vestige.indexes._shards import Marker, StoredRows, map_shard, read_marker, shard_fault, shard_path
from vestige.jobs import cut_ranges, ranges
from vestige.lazy import torch
from vestige.storage import local_result
from vestige.timing import count_bytes, time_phase

if TYPE_CHECKING:
    from torch import Tensor

    from vestige.compress import CompressionSpec

BLOCK_BYTES, CARD_BLOCK_BYTES = 4 * 2**20, 256 * 2**20
"""Gradients in float32 that are in memory at once, or on a card, unless a row alone has more."""
_SHOWN = 10
"""Faults that a message lists."""
_SCAN_NUMBERS = 2**20
"""Numbers that are multiplied at once: a product of fewer rows takes longer, one of more leaves the cache."""
_SCAN_SCORES = 2**20
"""Scores that a scan yields at once, at most, unless those of `_SCAN_NUMBERS` are more."""


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
        folder = Path(local_result(folder))
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

    @property
    def spec(self) -> CompressionSpec:
        """The compression; files that are kept with the index are found in its folder."""
        from vestige.compress import parse_spec

        return parse_spec(self.manifest.compression.spec, self.folder)

    def columns(self, number: int) -> slice:
        """Return the columns of component `number`; all of them when the whole model was compressed into one vector."""
        component = self.manifest.components[number]
        return slice(component.start, component.stop)

    @property
    def spans(self) -> tuple[Span, ...]:
        """Columns that hold one compressed gradient each: a component's, or the sum of all components'."""
        return self.manifest.spans

    def blocks(
        self, max_bytes: int | None = None, *, shards: range | None = None, device: torch.device | None = None
    ) -> Iterator[IndexBlock]:
        """Yield every row once, in the order of the plan; the next shard is read in the background.

        Args:
            max_bytes: Most bytes of float32 gradients per block (one row may exceed it). Not given: on the CPU as many
                as stay in the processor's cache.
            shards: Only the rows of these shards.
            device: Where the gradients are put; everything else is on the CPU. Not given: on the CPU.
        """
        step = max((max_bytes or (CARD_BLOCK_BYTES if _is_card(device) else BLOCK_BYTES)) // (4 * self.width), 1)
        for stored in self._read_ahead(shards):
            for start in range(0, len(stored.loss), step):
                rows = slice(start, start + step)
                # Copies, so that a block that is kept does not keep its shard's file mapped.
                example, loss, norm = (each[rows].clone() for each in (stored.example, stored.loss, stored.norm))
                yield IndexBlock(example, stored.decode(rows, device or "cpu"), loss, norm)

    def scan(
        self, vectors: Float[Tensor, "query column"], *, shards: range | None = None
    ) -> Iterator[tuple[Int[Tensor, "row"], Float[Tensor, "query row"], Float[Tensor, "row"]]]:
        """Yield (positions in the data, inner products with the vectors, norms) of every row, in the order of the plan.

        Rows are multiplied as they are stored, a few MB at a time, and the products with the rows' scale. Which rows
        are multiplied at once follows from the index alone, and so does every bit of a score.

        Args:
            vectors: One for each query, float32; where they lie, rows are multiplied. What is yielded is on the CPU.
            shards: Only the rows of these shards.
        """
        columns, on_card = vectors.T.contiguous(), _is_card(vectors.device)
        step = max((CARD_BLOCK_BYTES // 4 if on_card else _SCAN_NUMBERS) // self.width, 1)
        numbers = torch.empty(0 if on_card else min(step, max(self.manifest.shard_rows)), self.width)
        at_once = step * max(_SCAN_SCORES // (step * max(len(vectors), 1)), 1)
        for stored in self._read_ahead(shards):
            for first in range(0, len(stored.loss), at_once):
                rows = slice(first, min(first + at_once, len(stored.loss)))
                with time_phase("scoring"):
                    parts = stored.gradients[rows].split(step)
                    if on_card:
                        products = torch.cat([(send(part, vectors.device).float() @ columns).cpu() for part in parts])
                    else:
                        products = torch.cat([numbers[: len(part)].copy_(part) @ columns for part in parts])
                    if stored.scale is not None:
                        products.mul_(stored.scale[rows, None])
                yield stored.example[rows].clone(), products.T.contiguous(), stored.norm[rows].clone()

    def shard_groups(self, max_bytes: int) -> list[range]:
        """Group consecutive shards by at most `max_bytes` of stored gradients, a larger shard by itself.

        The pieces of work on an index: they follow from the index alone, never from the processes that work on them.
        """
        return cut_ranges([rows * self.manifest.row_bytes for rows in self.manifest.shard_rows], max_bytes)

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
        return find_places(self.folder, self.manifest)

    def _shard(self, number: int) -> StoredRows:
        stored, expected = map_shard(self.folder, number), (self.manifest.shard_rows[number], self.width)
        if stored.gradients.shape != expected:
            raise CorruptFile(
                f"{shard_path(self.folder, number)} holds gradients of shape {tuple(stored.gradients.shape)}, and the "
                f"manifest records {expected}. Build the index again: run its vestige index command with --overwrite."
            )
        return stored

    def _read_ahead(self, shards: range | None) -> Iterator[StoredRows]:
        """Yield the shards, each read, and compared with its sha256, while the one before is worked on."""
        numbers = range(len(self.manifest.shard_rows)) if shards is None else shards
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="vestige-read") as reader:
            coming: Future[StoredRows] | None = None
            for number in [*numbers, None]:
                ready, coming = coming, None if number is None else reader.submit(self._shard, number)
                if ready is not None:
                    with time_phase("reading"):
                        stored = ready.result()
                    count_bytes("read", len(stored.loss) * self.manifest.row_bytes)
                    yield stored
                    # What was worked on must not stay mapped.
                    del stored, ready

    def _faults(self, *, contents: bool) -> list[ShardFault]:
        return [
            ShardFault(number, reason)
            for number, expected in enumerate(expect_shards(self.manifest))
            if (reason := shard_fault(self.folder, number, expected, contents=contents))
        ]


def _is_card(device: torch.device | None) -> bool:
    return device is not None and device.type == "cuda"


def find_places(folder: Path, manifest: Manifest, *, checked: bool = True) -> np.ndarray:
    """Return one more than where each example's row lies among all stored rows, int32 or int64 [example].

    CorruptFile if the shards do not hold each example once. `checked` is as for `map_shard`.
    """
    ends = np.cumsum(manifest.shard_rows)
    total, first, faults = int(ends[-1]), 0, list[str]()
    places = np.zeros(total, np.int32 if total < np.iinfo(np.int32).max else np.int64)
    for number, count in enumerate(manifest.shard_rows):
        rows = map_shard(folder, number, checked=checked).example.numpy()
        known = np.flatnonzero((rows >= 0) & (rows < total))
        if len(known) < len(rows):
            faults.append(f"shard {number} holds rows that the data does not have")
        if len(np.unique(rows[known])) < len(known):
            faults.append(f"shard {number} holds examples twice")
        taken = places[rows[known]]
        if len(taken := taken[taken > 0]):
            others = np.unique(np.searchsorted(ends, taken - 1, side="right"))
            faults.append(f"shard {number} overlaps with {ranges(others.tolist())}")
        places[rows[known]] = first + known + 1
        first += count
    if not places.all():
        faults.append(f"rows {ranges(np.flatnonzero(places == 0).tolist())[:200]} are in no shard")
    if faults:
        raise corrupt_shards(f"The shards of {folder} do not hold each of {total:,} examples once", faults)
    return places


def corrupt_shards(what: str, faults: list[str]) -> CorruptFile:
    """Return the error to raise for shards with these faults."""
    more = f", and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
    return CorruptFile(
        f"{what}: {'; '.join(faults[:_SHOWN])}{more}. Run the same vestige index command again, or with --overwrite."
    )


def parts_in_order(index: Index, rows: int | None = None) -> Iterator[tuple[slice, Float[Tensor, "row column"]]]:
    """Yield consecutive rows of the data and their gradients, `rows` at a time; not given: as many as fit in 16 MB."""
    step = rows or max(16 * 2**20 // (4 * index.width), 1)
    for start in range(0, index.rows, step):
        part = slice(start, min(start + step, index.rows))
        yield part, index.gradients_of(np.arange(part.start, part.stop))
