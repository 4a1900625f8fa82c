"""What each model of a bank leaves on disk: one row of a Parquet table, and a marker that says it is whole."""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet

from vestige.errors import CorruptFile, DataError
from vestige.parsing import as_record, parse_object
from vestige.storage import remove_durably, sha256_of, write_durably

MEASURES = ("loss", "margin", "gap", "accuracy")
"""What is measured of a text; each becomes a column for the examples and one for the queries."""

Measured = Mapping[str, np.ndarray]
"""Columns such as `query_loss` [query] and `example_margin` [example], float64."""


class Member(NamedTuple):
    """One model of a bank."""

    subset: int
    """Number of the subset that it is trained on."""
    seed: int
    """Which of the runs on that subset."""


class _Marker(NamedTuple):
    bank: str
    subset: str
    """Digest of the subset that the member was trained on."""
    bytes: int
    sha256: str


@dataclass(frozen=True)
class MemberFiles:
    """The members of one bank; every process that computes one, however often, leaves the same bytes."""

    folder: Path
    id: str
    """The bank's id: a member of another bank does not count."""
    examples: int
    queries: int

    def path(self, member: Member) -> Path:
        """Return the path of a member's numbers."""
        return self.folder / f"{self.name(member)}.parquet"

    def name(self, member: Member) -> str:
        """Return the beginning of a member's file names; it does not change when the bank grows."""
        return f"{member.subset:05d}-{member.seed}"

    def weights(self, member: Member) -> Path:
        """Return the path of a member's model, if it was kept."""
        return self.folder / f"{self.name(member)}-model"

    def checkpoint(self, member: Member) -> Path:
        """Return the path where a member is saved while it is trained."""
        return self.folder / f"{self.name(member)}-unfinished.pt"

    def is_done(self, member: Member, digest: str, *, weights: bool = False) -> bool:
        """Return whether the member is marked as done for a subset of this digest, and its files are there.

        Its numbers must have the right size; its `weights` must be there if they are wanted.
        """
        marker = self._marker(member)
        if marker is None or (marker.bank, marker.subset) != (self.id, digest):
            return False
        if weights and not self.weights(member).is_dir():
            return False
        path = self.path(member)
        return path.exists() and path.stat().st_size == marker.bytes

    def write(self, member: Member, digest: str, rows: np.ndarray, measured: Measured) -> None:
        """Write the member's row to disk, whole, and then mark it so.

        Args:
            member: Which one.
            digest: Of its subset.
            rows: That it was trained on.
            measured: Columns by name, each with one value per example or query.

        Raises:
            DataError: A column is unknown or has the wrong length.
        """
        if self._marker_path(member).exists():
            remove_durably(self._marker_path(member))
        inside = np.zeros(self.examples, dtype=bool)
        inside[rows] = True
        columns: dict[str, pa.Array] = {
            "subset": pa.array([member.subset], pa.int64()),
            "seed": pa.array([member.seed], pa.int64()),
            "rows": pa.array([np.packbits(inside, bitorder="little").tobytes()], pa.binary()),
        }
        for name in sorted(measured):
            columns[name] = self._column(name, measured[name])
        sink = io.BytesIO()
        parquet.write_table(pa.table(columns), sink)
        written = write_durably(self.path(member), [sink.getbuffer()])
        marker = _Marker(self.id, digest, written.bytes, written.sha256)
        write_durably(self._marker_path(member), [(json.dumps(marker._asdict(), indent=1) + "\n").encode()])

    def read(self, member: Member, digest: str) -> pa.Table:
        """Read the member's row.

        Raises:
            CorruptFile: It is missing or damaged.
        """
        path = self.path(member)
        if not self.is_done(member, digest) or self._is_altered(member):
            raise CorruptFile(f"{path} is missing or damaged. Run the same command again: it is redone.")
        return parquet.read_table(path)

    def forget_damaged(self, member: Member, digest: str) -> None:
        """Unmark a member as done if its bytes are not what was written."""
        if self.is_done(member, digest) and self._is_altered(member):
            remove_durably(self._marker_path(member))

    def _column(self, name: str, values: np.ndarray) -> pa.Array:
        kind, _, measure = name.partition("_")
        if kind not in ("example", "query") or measure not in MEASURES:
            known = ", ".join(f"{kind}_{measure}" for kind in ("query", "example") for measure in MEASURES)
            raise DataError(f"{name!r} is nothing that a bank stores; it stores {known}.")
        count = self.examples if kind == "example" else self.queries
        flat = np.ascontiguousarray(values, dtype=np.float64)
        if flat.shape != (count,):
            raise DataError(f"{name} has shape {flat.shape}, expected one value for each of {count}.")
        return pa.FixedSizeListArray.from_arrays(pa.array(flat), count)

    def _marker_path(self, member: Member) -> Path:
        return self.folder / f"{self.name(member)}.json"

    def _is_altered(self, member: Member) -> bool:
        marker = self._marker(member)
        return marker is None or sha256_of(self.path(member)) != marker.sha256

    def _marker(self, member: Member) -> _Marker | None:
        try:
            return as_record(_Marker, parse_object(self._marker_path(member).read_bytes()))
        except (OSError, ValueError):
            return None


def write_table(path: Path, table: pa.Table) -> None:
    """Write the table as the whole content of the Parquet file `path`; one that holds the same is left alone."""
    sink = io.BytesIO()
    parquet.write_table(table, sink, row_group_size=max(len(table), 1))
    if not path.exists() or path.read_bytes() != sink.getvalue():
        write_durably(path, [sink.getbuffer()])
