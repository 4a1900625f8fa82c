"""`self_influence.parquet`: all training examples by their score for themselves, sorted with little memory.

Windows of rows are sorted one by one and put aside. Then all of them are merged from their heads, as many rows at once
as are guaranteed to precede the unread rows.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float

from vestige import disk_arrays
from vestige.row_order import WINDOW, windows
from vestige.scratch import Scratch

SELF_INFLUENCE = pa.schema([("example_id", pa.string()), ("row", pa.int64()), ("score", pa.float64())])
_HEAD = 2**10
"""Rows of a sorted window that are in memory at least while all are merged."""
_PAGE_BYTES = 2**16
"""Bytes of a column that are read at once."""
_HELD_BYTES = 2**20
"""Bytes of sorted windows that are put aside in memory."""


def write_self_influence(path: Path, scores: Float[np.ndarray, "example"], ids: Iterable[str]) -> None:
    """Write the table: every training example with its score for itself, highest first, ties by row.

    Examples that were left out have NaN, and no line. In memory are a window of rows and the heads of all windows.

    Raises:
        DiskSpaceError: The disk is full.
    """
    # Hardly a value comes twice: dictionaries would make the file larger, and are in memory until they are given up.
    settings: dict[str, Any] = {"compression": "zstd", "use_dictionary": False, "data_page_size": _PAGE_BYTES}
    with Scratch(path, _HELD_BYTES) as scratch, pq.ParquetWriter(path, SELF_INFLUENCE, **settings) as writer:
        for group in _grouped(_merged(_put_aside(scratch, scores, iter(ids)))):
            writer.write_table(group)


def _put_aside(scratch: Scratch, scores: Float[np.ndarray, "example"], ids: Iterator[str]) -> "list[_Head]":
    """Sort all windows of rows and put them aside."""
    end, found = 0, []
    for rows in windows(len(scores)):
        places = []
        for batch in _sorted(scores, rows, pa.array(islice(ids, rows.stop - rows.start), pa.string())):
            message = batch.serialize()
            scratch.write(message)
            places.append((end, message.size))
            end += message.size
        found.append(_Head(scratch, places))
    return found


def _sorted(scores: Float[np.ndarray, "example"], rows: slice, ids: pa.Array) -> list[pa.RecordBatch]:
    """Return the lines of some rows in their order, cut into heads."""
    own = scores[rows].astype(np.float64)
    disk_arrays.let_go(scores)
    # NaN is last in any order of numbers.
    order = np.argsort(-own, kind="stable")[: np.count_nonzero(~np.isnan(own))]
    table = pa.table([ids.take(pa.array(order)), order + rows.start, own[order]], schema=SELF_INFLUENCE)
    return table.to_batches(max_chunksize=_HEAD)


@final
class _Head:
    """The next lines of a sorted window."""

    def __init__(self, scratch: Scratch, waiting: list[tuple[int, int]]) -> None:
        self._scratch, self._waiting = scratch, iter(waiting)
        self._lines = SELF_INFLUENCE.empty_table()
        self.keys = np.empty(0)
        """Scores with the other sign, so that they ascend."""

    def refill(self) -> bool:
        """Read on until as many lines as others have are in memory; return False where none are left."""
        while len(self.keys) < _HEAD and (place := next(self._waiting, None)) is not None:
            batch = pa.ipc.read_record_batch(pa.py_buffer(self._scratch.read(*place)), SELF_INFLUENCE)
            self._lines = pa.concat_tables([self._lines, pa.Table.from_batches([batch])])
            self.keys = np.concatenate([self.keys, -batch["score"].to_numpy()])
        return len(self.keys) > 0

    def taken(self, bound: float, *, equal: bool) -> pa.Table:
        """Remove and return the lines with a smaller key, or an equal one too."""
        count = int(np.searchsorted(self.keys, bound, "right" if equal else "left"))
        first, self._lines, self.keys = self._lines[:count], self._lines[count:], self.keys[count:]
        return first


def _merged(heads: list[_Head]) -> Iterator[pa.Table]:
    """Yield the lines of all windows, which are in the order of their rows, part by part."""
    while heads := [head for head in heads if head.refill()]:
        # No line behind the heads comes before the end of the head that ends first; of equal scores, the row decides.
        bound, last = min((head.keys[-1], place) for place, head in enumerate(heads))
        lines = pa.concat_tables(head.taken(bound, equal=place <= last) for place, head in enumerate(heads))
        yield lines.take(pa.array(np.argsort(-lines["score"].to_numpy(), kind="stable")))


def _grouped(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Group the tables so that each is large enough to be read well."""
    group: list[pa.Table] = []
    for table in tables:
        group.append(table)
        if sum(map(len, group)) >= WINDOW:
            yield pa.concat_tables(group)
            group = []
    if group:
        yield pa.concat_tables(group)
