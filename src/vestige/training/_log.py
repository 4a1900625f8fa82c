"""The log of a recorded training: which examples each step saw, in order, with what loss, at what learning rate."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as compute

from vestige.storage import make_folder, remove_durably, remove_strays
from vestige.training._tables import read_table, write_table

SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("example_id", pa.string()),
        ("loss", pa.float64()),
        ("targets", pa.int64()),
        ("learning_rate", pa.float64()),
    ]
)
_FLUSH_ROWS = 2**16
"""Rows that wait in memory at most."""


class StepRecord(NamedTuple):
    """One optimizer step."""

    step: int
    """From 1."""
    ids: Sequence[str]
    """In the order in which the model saw them."""
    loss: np.ndarray
    """Mean per target token before the step, with dropout as it fell, nats; NaN without a target."""
    targets: np.ndarray
    learning_rate: float
    """Of the first parameter group."""


class StepLog:
    """Appends steps to a folder of Parquet parts, each whole or absent; `flush` before every checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._waiting: list[StepRecord] = []
        self._rows = 0

    def begin(self, step: int) -> None:
        """Prepare for the steps after `step`; drop what an interrupted training has logged of them."""
        make_folder(self.folder)
        remove_strays(self.folder)
        self._waiting, self._rows = [], 0
        # The last part first: a kill in between leaves no hole.
        for path in reversed(_parts(self.folder)):
            table = read_table(path)
            kept = table.filter(compute.field("step") <= step)
            if len(kept) == 0:
                remove_durably(path)
            elif len(kept) < len(table):
                self._write(kept)

    def add(self, record: StepRecord) -> None:
        """Remember one step."""
        self._waiting.append(record)
        self._rows += len(record.ids)
        if self._rows >= _FLUSH_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write everything that was added to the disk before returning."""
        if self._waiting:
            self._write(pa.concat_tables([_rows(record) for record in self._waiting]))
            self._waiting, self._rows = [], 0

    def table(self) -> pa.Table:
        """Return all rows on disk, in the order of training."""
        return read_steps(self.folder)

    def _write(self, table: pa.Table) -> None:
        write_table(self.folder / f"steps-{table['step'][0].as_py():010d}.parquet", table)


def read_steps(folder: Path) -> pa.Table:
    """Read all rows of a log: step, example_id, loss, targets, learning_rate.

    Raises:
        CorruptFile: A part is damaged.
    """
    return pa.concat_tables([SCHEMA.empty_table(), *map(read_table, _parts(folder))])


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("steps-*.parquet"))


def _rows(record: StepRecord) -> pa.Table:
    count = len(record.ids)
    columns = [
        [record.step] * count,
        list(record.ids),
        np.asarray(record.loss, dtype=np.float64),
        np.asarray(record.targets, dtype=np.int64),
        [record.learning_rate] * count,
    ]
    return pa.table([pa.array(values, field.type) for values, field in zip(columns, SCHEMA, strict=True)], SCHEMA)
