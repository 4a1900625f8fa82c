"""Folders in which rows made from rows are written: lines of JSON, the same as a `datasets` folder, and a record."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from vestige.data import Example, load_queries
from vestige.errors import DataError, IndexMismatch
from vestige.parsing import parse_json
from vestige.progress import announce
from vestige.runs import environment
from vestige.settings import PreparationSettings, flag
from vestige.storage import (
    make_folder,
    remove_durably,
    remove_strays,
    remove_tree,
    require_no_others,
    temporary_path,
    write_durably,
)

DATA, FLAGGED, DATASET, RECORD = "data.jsonl", "flagged.jsonl", "dataset", "prepare.json"
TOKENS = "tokens"
_REPLIES = ("replies/*/*.json", "replies/*.json")

WITHOUT_EFFECT = frozenset({"out", "push_to_hub", "private", "overwrite", "device"})
"""Settings of every kind that change no row."""


@dataclass(frozen=True)
class Prepared:
    """What was made: `data` is a file for `--data` of any command."""

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
        """Return the file of the rows, lines of JSON unless the kind says otherwise."""
        return self.out / self.file

    def __rich__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return "\n".join([*([f"{self.rows:,} rows in {self.data}"] if self.rows else []), *self.notes])


def read_rows(settings: PreparationSettings) -> list[Example]:
    """Return the requested rows; a row may be a prompt alone.

    Raises:
        DataError: They are absent or broken.
    """
    return load_queries(settings.data, may_be_prompts=False, learned=True, focus="keep", **settings.reading)


def row_of(example: Example) -> dict[str, Any]:
    """Return the example as a row in JSON terms that reads back as the same example."""
    return {name: _in_json(value) for name, value in example.columns.items()}


def fingerprint_of(examples: Sequence[Example]) -> str:
    """Return the sha256 over the rows."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json_line(row_of(example)))
    return digest.hexdigest()


def check_same_result(
    settings: PreparationSettings, kind: str, data: str | None, without_effect: frozenset[str]
) -> None:
    """Raise if the folder holds a finished result of other rows or settings, or files of others.

    Args:
        settings: Of the work to be done.
        kind: The word after `vestige data`.
        data: Fingerprint of the rows; None while it is not known.
        without_effect: Settings of this kind that change no row, beside those of every kind.

    Raises:
        IndexMismatch: It holds another result, and `overwrite` is not set; the message shows the differences.
        UserError: The folder holds other files.
    """
    before = _read_record(settings.out)
    require_no_others(settings.out, [*_lasting_files(settings), *([] if before is None else _files_of(before))])
    if before is None or settings.overwrite or "rows" not in before:
        return
    # The rows count, not the name of their file.
    now = {"kind": kind, **settings.record()}
    then = {"kind": before["kind"], **before["config"]}
    names = dict.fromkeys(name for name in (*now, *settings.added) if name not in WITHOUT_EFFECT | without_effect)
    changed = [name for name in names if name != "data" and now.get(name) != then.get(name)]
    different = [f"{flag(name)}: {then.get(name)!r} then, {now.get(name)!r} now" for name in changed]
    if data is not None and data != before.get("fingerprint"):
        different.append("--data: other rows")
    if different:
        raise IndexMismatch(
            f"{settings.out} holds a result of other settings: {'; '.join(different)}.\n"
            "Choose another --out, or replace it with --overwrite."
        )


def claim_result(settings: PreparationSettings, kind: str, fingerprint: str | None) -> None:
    """Write into the folder whose it is, before the first file of a result, and remove what an earlier result left.

    After a kill the same command recognises its own files; the record without `rows` is that of an unfinished result.
    """
    make_folder(settings.out)
    remove_strays(settings.out)
    before = _read_record(settings.out)
    claim = {"kind": kind, "config": settings.record(), "fingerprint": fingerprint}
    if before is not None and all(before.get(name) == value for name, value in claim.items()):
        return
    if before is not None:
        kept = {RECORD, TOKENS, *(name.split("/")[0] for name in _lasting_files(settings))}
        for path in [path for path in settings.out.iterdir() if path.name not in kept]:
            remove_tree(path)
    _write_record(settings.out, claim)


def _lasting_files(settings: PreparationSettings) -> list[str]:
    """Return what outlives a result: replies that were paid for, wherever in the folder they lie."""
    cache: Path | None = getattr(settings, "cache", None)
    out = settings.out.resolve()
    if cache is None or not cache.resolve().is_relative_to(out):
        return [*_REPLIES]
    return [*_REPLIES, str(cache.resolve().relative_to(out))]


def _files_of(record: Mapping[str, Any]) -> list[str]:
    """Return the files of a record's result, finished or not."""
    parts = record["config"].get("parts") or []
    names = {"split": [f"{part.partition('=')[0]}.jsonl" for part in parts], "candidates": ["candidates.parquet"]}
    names["tokenize"] = ["data.parquet", TOKENS]
    saved = [f"{DATASET}/{name}" for name in ("*.arrow", "dataset_info.json", "state.json")]
    return [RECORD, DATA, FLAGGED, *saved, *names.get(record["kind"], [])]


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
    """Write the rows into the folder of `settings.out`, and to the hub where `push_to_hub` says so.

    Args:
        settings: Of the command.
        kind: The word after `vestige data`.
        rows: Of the result; equal rows in equal order give equal bytes of data.jsonl.
        fingerprint: Of the rows that it was made from.
        flagged: Rows that are no good, each with a column `problem`; they go into a file of their own.
        details: More for the record, in JSON terms.
        notes: What a person should know.

    Raises:
        DataError: No row is left, or the hub refuses.
    """
    counts = dict(Counter(str(row["problem"]) for row in (*flagged, *rows) if "problem" in row))
    claim_result(settings, kind, fingerprint)
    if flagged:
        write_durably(settings.out / FLAGGED, map(json_line, flagged))
    else:
        remove_durably(settings.out / FLAGGED)
    if not rows:
        raise DataError(f"No row is left: {counts}. They are in {settings.out / FLAGGED}, each with its `problem`.")
    write_durably(settings.out / DATA, map(json_line, rows))
    dataset = _save_dataset(rows, settings.out / DATASET)
    finish_record(settings, kind, fingerprint, {"rows": len(rows), "flagged": counts, **(details or {})})
    if settings.push_to_hub is not None:
        _push(dataset, settings.push_to_hub, private=settings.private)
    return Prepared(kind, settings.out, len(rows), counts, tuple(notes))


def json_line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def _in_json(value: Any) -> Any:
    """Return a value of any column as JSON can hold it."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return str(value)
    return value


def _read_record(out: Path) -> dict[str, Any] | None:
    path = out / RECORD
    try:
        record = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}). Remove it, or choose another --out.") from error
    if not isinstance(record, dict) or not isinstance(record.get("config"), dict) or "kind" not in record:
        raise DataError(f"{path} is not a record of `vestige data`. Choose another --out.")
    return record


def _write_record(out: Path, record: Mapping[str, Any]) -> None:
    write_durably(out / RECORD, [json.dumps(record, indent=2, ensure_ascii=False).encode()])


def finish_record(settings: PreparationSettings, kind: str, fingerprint: str, counts: Mapping[str, Any]) -> None:
    """Write the record that makes a result a finished one."""
    made = {"vestige": environment(), "kind": kind, "command": settings.command_line(f"data {kind}")}
    _write_record(settings.out, {**made, "config": settings.record(), "fingerprint": fingerprint, **counts})


def _save_dataset(rows: Sequence[Mapping[str, Any]], folder: Path) -> Any:
    """Write the rows as a folder of the `datasets` library, which replaces an earlier one at once; return them."""
    import datasets

    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: _of_one_type(name, [row.get(name) for row in rows]) for name in names}
    dataset = datasets.Dataset.from_dict(columns)
    temporary = temporary_path(folder)
    datasets.disable_progress_bars()
    try:
        dataset.save_to_disk(str(temporary))
        remove_tree(folder)
        temporary.rename(folder)
    finally:
        datasets.enable_progress_bars()
        remove_tree(temporary)
    return dataset


def _of_one_type(name: str, values: list[Any]) -> list[Any]:
    """Return the column, its values as JSON text where they are of several types, which such a folder cannot hold."""
    try:
        pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
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
