"""What a bank leaves on disk: its manifest, and of each model a row of a table and a marker that says it is whole."""

import hashlib
import io
import json
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet

from vestige.banks._design import Subset
from vestige.errors import CorruptFile, DataError, Difference, IndexMismatch, differences, mismatch_message
from vestige.jobs import JOB_FILES
from vestige.parsing import as_record, parse_object
from vestige.storage import (
    make_folder,
    remove_durably,
    remove_result,
    remove_strays,
    require_no_others,
    sha256_of,
    write_durably,
)
from vestige.tables import write_table

BANK_FORMAT = 1
BANK_MEASURES = ("loss", "margin", "gap", "accuracy")
"""What is measured of a text; each becomes a column for the examples and one for the queries."""
Measured = Mapping[str, np.ndarray]
"""Columns such as `query_loss` [query] and `example_margin` [example], float64."""
_NAME = "bank.json"
_OURS = (
    _NAME,
    *(f"{name}.parquet" for name in ("members", "examples", "queries")),
    *(f"members/[0-9]*-[0-9]*{ending}" for ending in (".json", ".parquet", "-model", "-model.part", "-unfinished*")),
    *JOB_FILES,
    "tracking",
)
_SHOWN = 6


@dataclass(frozen=True)
class BankManifest:
    """Everything about a bank but its numbers."""

    identity: dict[str, Any]
    """Every setting, and the fingerprint of every input, that the numbers follow from; JSON terms."""
    subsets: tuple[tuple[str, str], ...]
    """Name and digest of each subset, in order."""
    seeds: int
    """Runs of each subset."""
    names: dict[str, str]
    """What model, data and queries were called, for people."""

    @property
    def id(self) -> str:
        """Sixteen hexadecimal digits of the sha256 over the identity; a larger bank of the same kind keeps it."""
        return hashlib.sha256(_canonical(self.identity)).hexdigest()[:16]

    @property
    def members(self) -> "list[Member]":
        """Every member, by subset and seed."""
        numbered = enumerate(digest for _, digest in self.subsets)
        return [Member(subset, seed, digest) for subset, digest in numbered for seed in range(self.seeds)]


def list_subsets(subsets: list[Subset]) -> tuple[tuple[str, str], ...]:
    """Return subsets as a manifest lists them."""
    return tuple((subset.name, subset.digest) for subset in subsets)


def require_bank(path: Path) -> None:
    """Raise if there is nothing at the path of a bank.

    Raises:
        DataError: It does not exist.
    """
    if not path.expanduser().exists():
        raise DataError(f"{path} is no bank: it does not exist. Make one with: vestige bank --out {path}")


def read_manifest(folder: Path) -> BankManifest | None:
    """Read the manifest of the bank in `folder`, None if there is none.

    Raises:
        IndexMismatch: It was written by another version of Vestige.
    """
    path = folder / _NAME
    try:
        fields = parse_object(path.read_bytes())
        if fields.get("format") == BANK_FORMAT:
            subsets = tuple((str(name), str(digest)) for name, digest in fields["subsets"])
            seeds = operator.index(fields["seeds"])
            return BankManifest(dict(fields["identity"]), subsets, seeds, dict(fields["names"]))
    except FileNotFoundError:
        return None
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise CorruptFile(f"{path} is damaged ({error!r}). Delete the bank, or give another --out.") from error
    raise IndexMismatch(
        f"{folder} is a bank of format {fields.get('format')}, and this version of Vestige reads format {BANK_FORMAT}. "
        "Use the version that made it, or make it again elsewhere."
    )


def prepare_manifest(
    folder: Path, wanted: BankManifest, design: Callable[[int], list[Subset]]
) -> tuple[BankManifest, list[Subset]]:
    """Return the manifest that the folder holds from now on, and its subsets, which may be more than were wanted.

    A bank that is there is extended, or stays if it is larger.

    Raises:
        IndexMismatch: The bank in the folder was made with other settings; nothing was changed.
        UserError: The folder holds other files.
    """
    old = read_manifest(folder)
    if old is None:
        require_no_others(folder, ())
        merged = wanted
    else:
        found = differences(old.identity, wanted.identity, old.names, wanted.names)
        common = min(len(old.subsets), len(wanted.subsets))
        if not found and old.subsets[:common] != wanted.subsets[:common]:
            found = [Difference("subsets", _name_subsets(old), _name_subsets(wanted))]
        if found:
            raise IndexMismatch(mismatch_message(f"The bank in {folder}", found))
        if len(design(len(old.subsets))) < len(old.subsets):
            raise IndexMismatch(
                f"The bank in {folder} has {len(old.subsets) - 1} lists to leave out, and {len(wanted.subsets) - 1} "
                "were given. Give all of them, with new ones behind, or another --out."
            )
        subsets = max(old.subsets, wanted.subsets, key=len)
        merged = replace(old, subsets=subsets, seeds=max(old.seeds, wanted.seeds))
    make_folder(folder)
    remove_strays(folder)
    if merged != old:
        fields = {"format": BANK_FORMAT, "id": merged.id, "identity": merged.identity, "names": merged.names}
        fields |= {"seeds": merged.seeds, "subsets": merged.subsets}
        write_durably(folder / _NAME, [(json.dumps(fields, indent=1, ensure_ascii=False) + "\n").encode()])
    make_folder(folder / "members")
    return merged, design(len(merged.subsets))


def remove_bank(folder: Path) -> None:
    """Remove the bank in `folder`, for `--overwrite`.

    Raises:
        UserError: The folder holds files that are not a bank's.
    """
    remove_result(folder, _OURS, _NAME)


def _name_subsets(manifest: BankManifest) -> str:
    names = [name for name, _ in manifest.subsets]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more} ({hashlib.sha256(_canonical(manifest.subsets)).hexdigest()[:8]})"


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


class Member(NamedTuple):
    """One model of a bank."""

    subset: int
    """Number of the subset that it is trained on."""
    seed: int
    """Which of the runs on that subset."""
    digest: str
    """Of the subset."""

    @property
    def name(self) -> str:
        """The beginning of its file names; it does not change when the bank grows."""
        return f"{self.subset:05d}-{self.seed}"


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

    def path(self, member: Member, ending: str = ".parquet") -> Path:
        """Return the path of a member's numbers, or of what else it leaves: `-model`, `-unfinished`, `.json`."""
        return self.folder / f"{member.name}{ending}"

    def is_done(self, member: Member, *, weights: bool = False) -> bool:
        """Return whether the member is marked as done, and its files are there.

        Its numbers must have the right size; its `weights` must be there if they are wanted.
        """
        marker = self._marker(member)
        if marker is None or (marker.bank, marker.subset) != (self.id, member.digest):
            return False
        if weights and not self.path(member, "-model").is_dir():
            return False
        path = self.path(member)
        return path.exists() and path.stat().st_size == marker.bytes

    def write(self, member: Member, rows: np.ndarray, measured: Measured) -> None:
        """Write the member's row to disk, whole, and then mark it so; `rows` are those that it was trained on.

        Raises:
            DataError: A column is unknown or has the wrong length.
        """
        marked = self.path(member, ".json")
        if marked.exists():
            remove_durably(marked)
        inside = np.zeros(self.examples, dtype=bool)
        inside[rows] = True
        columns: dict[str, pa.Array] = {
            "subset": pa.array([member.subset], pa.int64()),
            "seed": pa.array([member.seed], pa.int64()),
            "rows": pa.array([np.packbits(inside, bitorder="little").tobytes()], pa.binary()),
        }
        for name in sorted(measured):
            columns[name] = self._column(name, measured[name])
        written = write_table(self.path(member), pa.table(columns))
        marker = _Marker(self.id, member.digest, written.bytes, written.sha256)
        write_durably(marked, [(json.dumps(marker._asdict(), indent=1) + "\n").encode()])

    def read(self, member: Member) -> pa.Table:
        """Read the member's row.

        Raises:
            CorruptFile: It is missing or damaged.
        """
        path = self.path(member)
        if not self.is_done(member) or self._is_altered(member):
            raise CorruptFile(f"{path} is missing or damaged. Run the same command again: it is redone.")
        return parquet.read_table(path)

    def forget_damaged(self, member: Member) -> None:
        """Unmark a member as done if its bytes are not what was written."""
        if self.is_done(member) and self._is_altered(member):
            remove_durably(self.path(member, ".json"))

    def _column(self, name: str, values: np.ndarray) -> pa.Array:
        kind, _, measure = name.partition("_")
        if kind not in ("example", "query") or measure not in BANK_MEASURES:
            known = ", ".join(f"{kind}_{measure}" for kind in ("query", "example") for measure in BANK_MEASURES)
            raise DataError(f"{name!r} is nothing that a bank stores; it stores {known}.")
        count = self.examples if kind == "example" else self.queries
        flat = np.ascontiguousarray(values, dtype=np.float64)
        if flat.shape != (count,):
            raise DataError(f"{name} has shape {flat.shape}, expected one value for each of {count}.")
        return pa.FixedSizeListArray.from_arrays(pa.array(flat), count)

    def _is_altered(self, member: Member) -> bool:
        marker = self._marker(member)
        return marker is None or sha256_of(self.path(member)) != marker.sha256

    def _marker(self, member: Member) -> _Marker | None:
        try:
            return as_record(_Marker, parse_object(self.path(member, ".json").read_bytes()))
        except (OSError, ValueError):
            return None


def open_members(folder: Path, manifest: BankManifest) -> MemberFiles:
    """Return the files of the members of the bank in `folder`."""
    return MemberFiles(folder / "members", manifest.id, manifest.identity["examples"], manifest.identity["query_count"])


def update_table(path: Path, table: pa.Table) -> None:
    """Write the table as the whole content of a Parquet file; one that holds the same is left alone."""
    sink = io.BytesIO()
    parquet.write_table(table, sink, row_group_size=max(len(table), 1))
    if not path.exists() or path.read_bytes() != sink.getvalue():
        write_durably(path, [sink.getbuffer()])
