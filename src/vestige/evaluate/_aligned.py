"""The scores of a run in the order of other ids, a block of examples at a time: all of them are never in memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import eq
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as compute
from jaxtyping import Bool, Float, Int

from vestige.errors import IndexMismatch
from vestige.runs import DenseFile, Scores, id_array, open_dense

BLOCK_SCORES = 2**20
"""Scores that are read at once, for many queries."""
BLOCK_EXAMPLES = 2**16
"""Examples of a block, at most."""


class Block(NamedTuple):
    """Scores of some examples for every query."""

    places: slice | Int[np.ndarray, "column"]
    """Where these examples are among those that were requested."""
    scores: Float[np.ndarray, "query column"]


def _column_slices(queries: int, examples: int) -> Iterator[slice]:
    """Yield blocks of examples that fit in memory with their scores for all queries, in order."""
    size = max(1, min(BLOCK_EXAMPLES, BLOCK_SCORES // max(queries, 1)))
    return (slice(start, min(start + size, examples)) for start in range(0, examples, size))


@dataclass(frozen=True)
class Aligned:
    """All scores of a run, under the ids that were requested."""

    file: DenseFile
    queries: Int[np.ndarray, "query"]
    """Row of the file that each of them is."""
    examples: int
    """How many were requested."""
    places: Int[np.ndarray, "stored"] | None
    """For each example of the file, which of those it is, and -1 for none; None where all are the same."""

    @property
    def shape(self) -> tuple[int, int]:
        """Queries and examples."""
        return len(self.queries), self.examples

    def blocks(self) -> Iterator[Block]:
        """Yield all scores; examples come in the order of the file."""
        for columns in _column_slices(*self.file.shape):
            scores = self.file.read(examples=columns)[self.queries]
            if self.places is None:
                yield Block(columns, scores)
            else:
                places = self.places[columns]
                yield Block(places[places >= 0], scores[:, places >= 0])

    def of_query(self, query: int) -> Float[np.ndarray, "example"]:
        """Return one query's scores, in the order that was requested."""
        row = int(self.queries[query])
        scores = self.file.read(queries=slice(row, row + 1))[0]
        if self.places is None:
            return scores
        found = np.empty(self.examples, dtype=scores.dtype)
        found[self.places[self.places >= 0]] = scores[self.places >= 0]
        return found


class Ids(Protocol):
    """Ids that can be gone through several times."""

    def __iter__(self) -> Iterator[str]: ...
    def __len__(self) -> int: ...


def aligned(run: Scores, queries: Sequence[str], examples: Ids) -> Aligned:
    """Return the scores of a run for these queries and examples, in this order.

    Only where the run has other examples, or has them in another order, are the ids of both in memory, and then their
    positions.

    Raises:
        IndexMismatch: The run lacks some.
    """
    file = open_dense(run.folder)
    row = {name: number for number, name in enumerate(file.query_ids())}
    if absent := [name for name in queries if name not in row]:
        raise _lacks(run, "queries", len(absent), len(queries), absent[0])
    rows = np.array([row[name] for name in queries], dtype=np.int64)
    stored = file.example_ids()
    if len(stored) == len(examples) and all(map(eq, stored, examples)):
        return Aligned(file, rows, len(examples), None)
    wanted = id_array(examples)
    places = _places_in(wanted, id_array(stored))
    absent = np.ones(len(examples), dtype=bool)
    absent[places[places >= 0]] = False
    if absent.any():
        name = wanted[int(absent.argmax())].as_py()
        raise _lacks(run, "examples", int(absent.sum()), len(examples), name)
    return Aligned(file, rows, len(examples), places)


def _places_in(ids: pa.ChunkedArray, wanted: pa.ChunkedArray) -> Int[np.ndarray, "wanted"]:
    """Return the position of each of `wanted` among the ids; -1 for those that are not there."""
    found = compute.index_in(wanted, value_set=ids)  # pyright: ignore[reportAttributeAccessIssue]
    return np.concatenate([part.fill_null(-1).to_numpy(zero_copy_only=False) for part in found.chunks])


def blocks_of(scores: "Aligned | Float[np.ndarray, 'query example']") -> Iterator[Block]:
    """Yield all scores in blocks, in memory or on the disk."""
    if isinstance(scores, Aligned):
        return scores.blocks()
    return (Block(columns, scores[:, columns]) for columns in _column_slices(*scores.shape))


def summed(
    scores: "Aligned | Float[np.ndarray, 'query example']", sets: Bool[np.ndarray, "set example"]
) -> Float[np.ndarray, "set query"]:
    """Sum each query's scores over the examples of each set, in float64."""
    parts = (sets[:, places].astype(np.float64) @ part.astype(np.float64).T for places, part in blocks_of(scores))
    total = next(parts)
    for part in parts:
        total += part
    return total


def _lacks(run: Scores, what: str, absent: int, wanted: int, name: str) -> IndexMismatch:
    return IndexMismatch(
        f"{run.folder} has no scores for {absent} of the {wanted} {what}, such as {name!r}. It must be made with the "
        f"same {what}, under the same ids."
    )
