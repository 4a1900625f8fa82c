"""Rows on disk: lines of JSON, the same as a `datasets` folder, and a record of how they were made."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vestige.data import Example, load_queries
from vestige.errors import DataError, IndexMismatch
from vestige.files import make_folder, remove_durably, write_durably
from vestige.parsing import parse_object
from vestige.progress import announce
from vestige.runs import environment
from vestige.settings import PreparationSettings, flag

DATA, FLAGGED, DATASET, RECORD = "data.jsonl", "flagged.jsonl", "dataset", "prepare.json"

WITHOUT_EFFECT = frozenset({"out", "push_to_hub", "private", "overwrite", "device"})
"""Settings of every kind that change no row."""


@dataclass(frozen=True)
class Prepared:
    """What was made: `data` is a file for `--data` of any verb."""

    kind: str
    out: Path
    rows: int
    """In data.jsonl; 0 after a dry run."""
    flagged: Mapping[str, int] = field(default_factory=dict)
    """Rows by what is wrong with them."""
    notes: tuple[str, ...] = ()
    file: str = DATA

    @property
    def data(self) -> Path:
        """The rows, as lines of JSON unless the kind says otherwise."""
        return self.out / self.file

    def __rich__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return "\n".join([*([f"{self.rows:,} rows in {self.data}"] if self.rows else []), *self.notes])


def read_rows(settings: PreparationSettings) -> list[Example]:
    """The rows that were asked for; a row may be a prompt alone.

    Raises:
        DataError: They are absent or broken.
    """
    examples = load_queries(settings.data, may_be_prompts=False)
    if settings.limit is not None and settings.limit < len(examples):
        announce(f"Only the first {settings.limit:,} of {len(examples):,} rows are used (limit={settings.limit}).")
    return examples[: settings.limit]


def row_of(example: Example) -> dict[str, Any]:
    """The example as a row that reads back as the same example; columns without a value are left out."""
    row: dict[str, Any] = {"id": example.id}
    if example.messages:
        row["messages"] = [{"role": message.role, "content": message.content} for message in example.messages]
    row |= {"text": example.text, "prompt": example.prompt, "completion": example.completion}
    row |= {"source": example.source, "label": example.label}
    extra = {name: _in_json(value) for name, value in example.extra.items() if name not in row}
    return {name: value for name, value in (row | extra).items() if value is not None}


def fingerprint_of(examples: Sequence[Example]) -> str:
    """sha256 over the rows."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(_line(row_of(example)))
    return digest.hexdigest()


def check_same_result(settings: PreparationSettings, kind: str, data: str, without_effect: frozenset[str]) -> None:
    """Nothing happens unless the folder holds a result of other rows or settings.

    Args:
        settings: Of the work to be done.
        kind: The word after `vestige data`.
        data: Fingerprint of its rows.
        without_effect: Settings of this kind that change no row, beside those of every kind.

    Raises:
        IndexMismatch: It does, and `overwrite` was not asked for; the message shows the differences.
        DataError: The folder holds other files.
    """
    path = settings.out / RECORD
    if not path.exists():
        if (settings.out / DATA).exists() and not settings.overwrite:
            raise DataError(f"{settings.out / DATA} is there already, and not by `vestige data`. Choose another --out.")
        return
    if settings.overwrite:
        return
    before = _read_record(path)
    # The rows count, not the name of their file.
    now = {"kind": kind, **settings.record(), "data": data}
    then = {"kind": before.get("kind"), **before.get("config", {}), "data": before.get("fingerprint")}
    names = [name for name in now if name not in WITHOUT_EFFECT | without_effect and name != "data"]
    changed = [name for name in names if now[name] != then.get(name)]
    different = [f"{flag(name)}: {then.get(name)!r} then, {now[name]!r} now" for name in changed]
    if now["data"] != then["data"]:
        different.append("--data: other rows")
    if different:
        raise IndexMismatch(
            f"{settings.out} holds a result of other settings: {'; '.join(different)}.\n"
            "Choose another --out, or replace it with --overwrite."
        )


def write_prepared(
    settings: PreparationSettings,
    kind: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    fingerprint: str,
    flagged: Sequence[Mapping[str, Any]] = (),
    details: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
) -> Prepared:
    """The rows are in the folder of `settings.out`, and on the hub if that was asked for.

    Args:
        settings: What was asked for.
        kind: The word after `vestige data`.
        rows: Of the result; equal rows in equal order give equal bytes of data.jsonl.
        fingerprint: Of the rows that it was made from.
        flagged: Rows that are no good, each with a column `problem`; they go into a file of their own.
        details: More for the record, in JSON terms.
        notes: What a person should know.

    Raises:
        DataError: No row is left, or the hub refuses.
    """
    counts: dict[str, int] = {}
    for row in [*flagged, *(row for row in rows if "problem" in row)]:
        counts[str(row["problem"])] = counts.get(str(row["problem"]), 0) + 1
    make_folder(settings.out)
    if flagged:
        write_durably(settings.out / FLAGGED, map(_line, flagged))
    else:
        remove_durably(settings.out / FLAGGED)
    if not rows:
        raise DataError(f"No row is left: {counts}. They are in {settings.out / FLAGGED}, each with its `problem`.")
    write_durably(settings.out / DATA, map(_line, rows))
    dataset = _save_dataset(rows, settings.out / DATASET)
    record = {
        "vestige": environment(),
        "kind": kind,
        "command": settings.command_line(f"data {kind}"),
        "config": settings.record(),
        "fingerprint": fingerprint,
        "rows": len(rows),
        "flagged": counts,
        **(details or {}),
    }
    write_durably(settings.out / RECORD, [json.dumps(record, indent=2, ensure_ascii=False).encode()])
    if settings.push_to_hub is not None:
        _push(dataset, settings.push_to_hub, private=settings.private)
    return Prepared(kind, settings.out, len(rows), counts, tuple(notes))


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def _in_json(value: Any) -> Any:
    """A value of any column as JSON can hold it."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return str(value)
    return value


def _read_record(path: Path) -> dict[str, Any]:
    try:
        return parse_object(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}). Remove it, or choose another --out.") from error


def _save_dataset(rows: Sequence[Mapping[str, Any]], folder: Path) -> Any:
    """The rows as a folder of the `datasets` library, which replaces an earlier one at once."""
    import datasets

    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: _of_one_type(name, [row.get(name) for row in rows]) for name in names}
    dataset = datasets.Dataset.from_dict(columns)
    temporary = folder.with_name(f"{folder.name}.tmp.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    datasets.disable_progress_bars()
    try:
        dataset.save_to_disk(str(temporary))
    finally:
        datasets.enable_progress_bars()
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    return dataset


def _of_one_type(name: str, values: list[Any]) -> list[Any]:
    """The column, its values as JSON text where they are of several types, which such a folder cannot hold."""
    import pyarrow

    try:
        pyarrow.array(values)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, pyarrow.ArrowNotImplementedError):
        announce(f"{DATASET}/: the column {name!r} holds values of several types and is kept there as JSON text.")
        return [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]
    return values


def _push(dataset: Any, name: str, *, private: bool) -> None:
    announce(f"Uploading {len(dataset):,} rows to {name}")
    try:
        dataset.push_to_hub(name, private=private)
    except Exception as error:
        # The hub's client raises whatever its transport does; the rows are on disk by now.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"The rows are on disk, but {name} did not take them: {reason}. Log in with `hf auth login`, check the "
            "name, and run the same command again."
        ) from error
