"""A selection on disk: the chosen rows, the reasons, and the record of how they came about."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, final

import pyarrow as pa
import pyarrow.parquet as parquet
from rich.console import Group
from rich.table import Table

from vestige.errors import CorruptFile, IndexMismatch, UserError, differences
from vestige.parsing import parse_object
from vestige.storage import make_folder, remove_strays, require_no_others, sha256_of, write_durably
from vestige.tables import write_table
from vestige.terminal import as_text, shorten

FORMAT = 1
RECORD, DATA, REASONS, REMOVED = "selection.json", "selected.jsonl", "selected.parquet", "removed.jsonl"
FILES = (RECORD, DATA, REASONS, REMOVED)
_SHOWN = 10

_SCHEMA = pa.schema(
    [
        ("rank", pa.int64()),
        ("example_id", pa.string()),
        ("row", pa.int64()),
        ("score", pa.float64()),
        ("target", pa.string()),
        ("reason", pa.string()),
        ("source", pa.string()),
        ("tokens", pa.int64()),
        ("replaces", pa.list_(pa.string())),
        ("cosines", pa.list_(pa.float64())),
    ]
)


@dataclass
class Choice:
    """One chosen example, and why."""

    rank: int
    """From 1, in the order in which examples were taken."""
    example_id: str
    row: int
    """In the data that was chosen from."""
    score: float | None
    """What the strategy went by; None where it went by none."""
    target: str | None
    """The query or target that chose it."""
    reason: str
    source: str | None = None
    tokens: int | None = None
    replaces: list[str] = field(default_factory=list)
    """Ids of the later examples that were left out because their gradients are like this one's."""
    cosines: list[float] = field(default_factory=list)
    """Of those gradients with this one's."""


@final
class SelectedData:
    """A selection: the chosen examples in the order in which they were taken, with reasons.

    `data` is the file to train on; its rows are in the order of the data that was chosen from.
    """

    def __init__(self, folder: Path, record: dict[str, Any]) -> None:
        self.folder, self.record = folder, record
        self.data: Path = folder / DATA
        """The chosen rows as JSON lines, with all their columns."""
        self.removed: Path | None = folder / REMOVED if REMOVED in record["files"] else None
        """The rows that `min_score`, `drop` and `duplicates` kept out, each with its `problem`; None without any."""
        self.notes: list[str] = record["notes"]
        """What a reader should know of the selection."""

    @classmethod
    def open(cls, folder: str | Path) -> "SelectedData":
        """Open the selection in a folder.

        Raises:
            UserError: There is none, or a newer Vestige made it.
            CorruptFile: Its files are not what was written.
        """
        folder = Path(folder)
        record = require_selection(folder)
        if not _is_whole(folder, record):
            raise CorruptFile(f"{folder} is damaged: its files are not what was written. Run `vestige select` again.")
        return cls(folder, record)

    @cached_property
    def choices(self) -> list[Choice]:
        """Every chosen example with its reasons."""
        return [Choice(**row) for row in parquet.read_table(self.folder / REASONS).to_pylist()]

    @property
    def ids(self) -> list[str]:
        """Ids of the chosen examples, in the order in which they were taken."""
        return [choice.example_id for choice in self.choices]

    def __len__(self) -> int:
        return len(self.choices)

    def __str__(self) -> str:
        return as_text(self, 120)

    def __rich__(self) -> Group:
        table = Table()
        for name in ("rank", "example", "score", "reason", "replaces"):
            table.add_column(name, justify="right" if name in ("rank", "score") else "left")
        for choice in self.choices[:_SHOWN]:
            score = "" if choice.score is None else f"{choice.score:.4g}"
            names = [shorten(choice.example_id), shorten(choice.reason, 120), *map(shorten, choice.replaces[:3])]
            table.add_row(str(choice.rank), names[0], score, names[1], ", ".join(names[2:]))
        more = [f"... and {len(self) - _SHOWN} more"] if len(self) > _SHOWN else []
        files = [str(path) for path in (self.data, self.removed) if path is not None]
        return Group(self.record["title"], table, *more, *self.notes, *files)


def read_record(folder: Path) -> dict[str, Any] | None:
    """Read the content of `selection.json`, None if there is none.

    Raises:
        UserError: It does not read, or a newer Vestige made it.
    """
    path = folder / RECORD
    try:
        record = parse_object(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}). Delete the folder, or type --overwrite.") from error
    if record.get("format") != FORMAT:
        raise UserError(f"{path} has format {record.get('format')}; this version of Vestige reads {FORMAT}.")
    kinds = {"identity": dict, "files": dict, "notes": list, "title": str}
    odd = [name for name, kind in kinds.items() if not isinstance(record.get(name), kind)]
    if odd and "files" in record:  # else it was begun and is not finished
        raise CorruptFile(f"{path} is damaged: its `{odd[0]}` is not what Vestige writes. Run `vestige select` again.")
    return record


def require_selection(folder: str | Path) -> dict[str, Any]:
    """Return the record of the finished selection in a folder.

    Raises:
        UserError: There is none, or a newer Vestige made it.
        CorruptFile: Its record is damaged.
    """
    record = read_record(Path(folder))
    if record is None or "files" not in record:
        raise UserError(f"{folder} is no selection: it has no finished {RECORD}. Make one with `vestige select`.")
    return record


def find_finished(folder: Path, identity: dict[str, Any]) -> SelectedData | None:
    """Return the selection in the folder if it is the wanted one and whole; None if it is still to be made.

    Raises:
        IndexMismatch: Another selection is there; nothing was changed.
        UserError: The folder holds other files.
    """
    record = read_record(folder)
    require_no_others(folder, () if record is None else FILES)
    if record is None or "files" not in record:
        return None
    if found := differences(record["identity"], identity, {}, {}):
        lines = [f"  {one.field}: {shorten(one.old, 60)} there, {shorten(one.new, 60)} now" for one in found]
        raise IndexMismatch(
            "\n".join([f"{folder} holds another selection; nothing was changed.", *lines])
            + "\nGive another --out, or replace it with --overwrite."
        )
    return SelectedData(folder, record) if _is_whole(folder, record) else None


def write_selection(
    folder: Path,
    about: dict[str, Any],
    lines: Iterable[bytes],
    choices: Sequence[Choice],
    removed: Iterable[bytes] | None,
) -> SelectedData:
    """Write the selection; its record lists no files until they are all there, and marks the folder before.

    `about` is the record but for format and files; `lines` are the chosen rows as JSON, `removed` those that were kept
    out for a reason, None if there are none.
    """
    make_folder(folder)
    remove_strays(folder)
    record = {"format": FORMAT, **about}
    _write_record(folder, record)
    reasons = pa.Table.from_pylist([vars(choice) for choice in choices], schema=_SCHEMA)
    written = {DATA: write_durably(folder / DATA, lines), REASONS: write_table(folder / REASONS, reasons)}
    if removed is not None:
        written[REMOVED] = write_durably(folder / REMOVED, removed)
    record |= {"files": {name: {"bytes": file.bytes, "sha256": file.sha256} for name, file in written.items()}}
    _write_record(folder, record)
    return SelectedData(folder, record)


def _write_record(folder: Path, record: dict[str, Any]) -> None:
    write_durably(folder / RECORD, [(json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode()])


def digest_of(words: Sequence[str]) -> str:
    """Return sixteen hexadecimal digits that identify a list of words."""
    return hashlib.sha256(json.dumps(list(words)).encode()).hexdigest()[:16]


def _is_whole(folder: Path, record: dict[str, Any]) -> bool:
    files = record["files"]
    return set(files) <= set(FILES) and all(
        (folder / name).is_file() and isinstance(file, dict) and sha256_of(folder / name) == file.get("sha256")
        for name, file in files.items()
    )
