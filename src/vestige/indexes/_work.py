"""An index as a work plan: its shards are the pieces, and the reduce verifies that they are the whole data."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import final, overload

import numpy as np

from vestige.data import Example
from vestige.errors import CorruptFile
from vestige.indexes._content import ShardContent
from vestige.indexes._manifest import Expectation, Manifest, expected_shards
from vestige.indexes._plan import Plan, PlannedShard
from vestige.indexes._shards import map_shard, shard_fault, write_shard
from vestige.indexes._store import Index
from vestige.launch import Compute, ranges, step_done
from vestige.lockstep import is_first

_SHOWN = 10


@final
class PlannedBatches(Sequence[np.ndarray]):
    """The batches of one shard; a loop over them counts one as done when it requests the next."""

    def __init__(self, batches: tuple[np.ndarray, ...]) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[np.ndarray, ...]: ...
    def __getitem__(self, index: int | slice) -> np.ndarray | tuple[np.ndarray, ...]:
        return self._batches[index]

    def __iter__(self) -> Iterator[np.ndarray]:
        for batch in self._batches:
            yield batch
            step_done(len(batch))


ShardCompute = Callable[[PlannedBatches], Iterable[ShardContent]]
"""Turns the batches of a shard (each an array of rows of the data) into its content, part by part, rows in that order;
it iterates over the batches once. A part is stored before the next one is requested."""


@dataclass(frozen=True)
class IndexPlan:
    """The shards of an index, and the finished index; `prepare_index` makes the folder ready for it."""

    folder: Path
    manifest: Manifest
    """From `plan_index`."""
    plan: Plan
    """From `plan_index`."""
    examples: Sequence[Example]
    """All examples, in row order."""
    compute: Callable[[], AbstractContextManager[ShardCompute]]
    """Opens what shards are computed with."""
    skip_bad: bool = False
    name: str = "Indexing"
    unit: str = "examples"

    @property
    def pieces(self) -> int:
        """Number of shards."""
        return len(self.plan)

    def is_done(self, piece: int) -> bool:
        """Return whether the shard's marker is this index's and its file has the right size."""
        return shard_fault(self.folder, piece, self.expected[piece], contents=False) is None

    def weight(self, piece: int) -> int:
        """Return the number of examples in the shard."""
        return self.expected[piece].rows

    @contextmanager
    def open(self) -> Iterator[Compute]:
        """Yield the function that computes a shard and writes it."""
        with self.compute() as compute:
            yield lambda piece: self._fill(piece, compute)

    def reduce(self) -> Index:
        """Return the finished index.

        Raises:
            CorruptFile: Shards are missing, or do not hold each example once; the message lists them.
        """
        faults = [
            f"shard {number}: {fault}"
            for number in range(self.pieces)
            if (fault := shard_fault(self.folder, number, self.expected[number], contents=False))
        ]
        if faults:
            raise CorruptFile(_listed(f"{len(faults)} of {self.pieces} shards of {self.folder} do not count", faults))
        require_each_example_once(self.folder, self.manifest)
        return Index.open(self.folder)

    @cached_property
    def expected(self) -> tuple[Expectation, ...]:
        """The record of each shard in the manifest."""
        return expected_shards(self.manifest)

    def _fill(self, piece: int, compute: ShardCompute) -> None:
        planned = self.plan.shards[piece]
        parts = _as_planned(compute(PlannedBatches(planned.batches)), planned, self.manifest)
        if not is_first():
            for _ in parts:
                pass
            return
        write_shard(
            self.folder,
            piece,
            parts,
            self.manifest.dtype,
            self.expected[piece],
            self._name_of,
            skip_bad=self.skip_bad,
        )

    def _name_of(self, row: int) -> str:
        return f'"{self.examples[row].id}" (row {row})'


def require_each_example_once(folder: Path, manifest: Manifest) -> None:
    """Raise unless every row of the data is in exactly one position of one shard.

    Raises:
        CorruptFile: Shards overlap, or leave examples out; the message lists both.
    """
    total = sum(manifest.shard_rows)
    # One more than the number of the shard that holds the row; 0 where none does.
    holder = np.zeros(total, np.int32)
    faults = []
    for number in range(len(manifest.shard_rows)):
        rows = map_shard(folder, number, checked=False).example.numpy()
        inside = rows[(rows >= 0) & (rows < total)]
        if len(inside) < len(rows):
            faults.append(f"shard {number} holds rows that the data does not have")
        if len(np.unique(inside)) < len(inside):
            faults.append(f"shard {number} holds examples twice")
        others = set((holder[inside] - 1).tolist()) - {-1}
        holder[inside] = number + 1
        if others:
            faults.append(f"shard {number} overlaps with {ranges(sorted(others))}")
    if not holder.all():
        faults.append(f"rows {ranges(np.flatnonzero(holder == 0).tolist())[:200]} are in no shard")
    if faults:
        raise CorruptFile(_listed(f"The shards of {folder} do not hold each of {total:,} examples once", faults))


def _listed(what: str, faults: list[str]) -> str:
    more = f", and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
    return f"{what}: {'; '.join(faults[:_SHOWN])}{more}. Run the same vestige index command again, or with --overwrite."


def _as_planned(parts: Iterable[ShardContent], planned: PlannedShard, manifest: Manifest) -> Iterator[ShardContent]:
    """Yield the parts; raise unless they are the rows that were planned."""
    first, all_rows = 0, planned.rows
    for content in parts:
        rows = all_rows[first : first + len(content.example)]
        first += len(content.example)
        if not np.array_equal(content.example.cpu().numpy(), rows):
            raise ValueError(f"shard {planned.number} was computed with other rows than planned")
        shape = (len(rows), manifest.width)
        if content.gradients.shape != shape or not len(content.loss) == len(content.norm) == len(rows):
            found = tuple(content.gradients.shape)
            raise ValueError(f"a part of shard {planned.number} has shape {found}, expected {shape}")
        yield content
    if first != len(all_rows):
        raise ValueError(f"shard {planned.number} was computed with {first} of {len(all_rows)} rows")
