"""Rows made from rows, `vestige data split` and `vestige data tokenize`, and the folders in which they are written.

A folder holds lines of JSON, the same as a `datasets` folder, and a record of how they were made.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
from jaxtyping import Int

from vestige.data import (
    NO_TARGET,
    Example,
    TokenizedData,
    describe_copies,
    find_unused_columns,
    load_queries,
    pack_blocks,
    text_groups,
    tokenize_source,
)
from vestige.errors import DataError, IndexMismatch, SpecError
from vestige.models import load_tokenizer
from vestige.parsing import parse_json
from vestige.progress import announce, progress
from vestige.runs import environment
from vestige.settings import PreparationSettings, SplitSettings, TokenizeSettings, flag, with_settings
from vestige.storage import (
    make_folder,
    remove_durably,
    remove_strays,
    remove_tree,
    require_no_others,
    temporary_path,
    write_durably,
)

DATA, FLAGGED, DATASET, RECORD, FILE = "data.jsonl", "flagged.jsonl", "dataset", "prepare.json", "data.parquet"
_REPLIES, _TOKENS = ("replies/*/*.json", "replies/*.json"), "tokens"

WITHOUT_EFFECT = frozenset({"out", "push_to_hub", "private", "overwrite", "device"})
"""Settings of every kind that change no row."""
_TOKENIZE_WITHOUT_EFFECT = frozenset({"workers"})
_ROWS = 1000
"""Rows of tokens in memory at once."""
_BLOCK_COLUMNS = ("id", "text", "source", "sources", "rows")
"""`source` has most of a block's tokens, `sources` says how many each has, and `rows` are the ids of its documents."""


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
        digest.update(_line(row_of(example)))
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
        kept = {RECORD, _TOKENS, *(name.split("/")[0] for name in _lasting_files(settings))}
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
    names["tokenize"] = ["data.parquet", _TOKENS]
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
        write_durably(settings.out / FLAGGED, map(_line, flagged))
    else:
        remove_durably(settings.out / FLAGGED)
    if not rows:
        raise DataError(f"No row is left: {counts}. They are in {settings.out / FLAGGED}, each with its `problem`.")
    write_durably(settings.out / DATA, map(_line, rows))
    dataset = _save_dataset(rows, settings.out / DATASET)
    _finish_record(settings, kind, fingerprint, {"rows": len(rows), "flagged": counts, **(details or {})})
    if settings.push_to_hub is not None:
        _push(dataset, settings.push_to_hub, private=settings.private)
    return Prepared(kind, settings.out, len(rows), counts, tuple(notes))


def _line(row: Mapping[str, Any]) -> bytes:
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


def _finish_record(settings: PreparationSettings, kind: str, fingerprint: str, counts: Mapping[str, Any]) -> None:
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


@with_settings(SplitSettings)
def split(settings: SplitSettings) -> Prepared:
    """Write a file of JSON lines for each part, and data.jsonl with every drawn row and the name of its `part`.

    Raises:
        DataError: The data is absent or broken, a part would be empty, or sources are requested and a row has none.
    """
    examples = read_rows(settings)
    fingerprint = fingerprint_of(examples)
    check_same_result(settings, "split", fingerprint, frozenset())
    groups = text_groups(examples)
    parts = _assign_parts(examples, groups, settings.shares, settings.by, settings.seed)
    rows = {
        name: [row_of(each) for each, part in zip(examples, parts, strict=True) if part == name]
        for name in settings.shares
    }
    empty = [name for name, held in rows.items() if not held]
    if empty:
        raise DataError(f"No row of {len(examples):,} falls to {', '.join(empty)}. Give larger shares or more rows.")
    claim_result(settings, "split", fingerprint)
    for name, held in rows.items():
        write_durably(settings.out / f"{name}.jsonl", map(_line, held))
    every = [row | {"part": name} for name, held in rows.items() for row in held]
    notes = [f"{len(held):,} rows in {settings.out / name}.jsonl" for name, held in rows.items()]
    left = len(examples) - len(every)
    notes += [f"{left:,} rows are in no part."] if left else []
    if (copies := describe_copies(groups)) is not None:
        firsts = np.unique(groups, return_index=True)[1]
        apart = sum(part != parts[int(firsts[group])] for group, part in zip(groups, parts, strict=True))
        notes += [copies, *([f"{apart:,} copies are not in the part of the first such row."] if apart else [])]
    return write_prepared(settings, "split", every, fingerprint=fingerprint, notes=notes)


def _assign_parts(
    examples: Sequence[Example], groups: Int[np.ndarray, "example"], shares: dict[str, float], by: str, seed: int
) -> list[str | None]:
    """Return the part of every example, None where the shares leave some out; the same for the same arguments.

    Examples of one group are in one part, wherever sources are not to stay whole.
    """
    draw = np.random.default_rng(seed)
    firsts = np.unique(groups, return_index=True)[1]
    if by == "example":
        parts = _draw_parts(len(firsts), shares, draw)
        return [parts[group] for group in groups]
    sources: dict[str, list[int]] = {}
    for row, example in enumerate(examples):
        if example.source is None:
            raise DataError(f"Row {row} (id {example.id!r}) has no `source`, and --by {by} asks for one.")
        sources.setdefault(example.source, []).append(row)
    if by == "source":
        part_of = dict(zip(sources, _draw_parts(len(sources), shares, draw), strict=True))
        return [part_of[str(example.source)] for example in examples]
    found: list[str | None] = [None] * len(examples)
    for rows in sources.values():
        own = [row for row in rows if firsts[groups[row]] == row]
        for row, part in zip(own, _draw_parts(len(own), shares, draw), strict=True):
            found[row] = part
    return [found[firsts[group]] for group in groups]


def _draw_parts(count: int, shares: dict[str, float], draw: np.random.Generator) -> list[str | None]:
    """Return a part for each of `count` things, in shares that are as near as whole numbers allow."""
    found: list[str | None] = [None] * count
    order = draw.permutation(count)
    ends = np.floor(np.cumsum(list(shares.values())) * count + 0.5 + 1e-9).astype(int)
    for name, begin, end in zip(shares, [0, *ends[:-1]], ends, strict=True):
        for thing in order[begin:end]:
            found[int(thing)] = name
    return found


@with_settings(TokenizeSettings)
def tokenize(settings: TokenizeSettings) -> Prepared:
    """Write a file with the tokens of every row as `input_ids`, and as `labels` where their prediction enters the loss.

    Texts and all other columns stay beside them, so reports still show what a row says. Every command takes the file as
    its --data and tokenises nothing again. Large data is tokenised in parts: killed, the same call goes on.

    Raises:
        DataError: The data is absent or broken, or a row does not become tokens.
        ModelError: There is no tokenizer.
        SpecError: An upload was requested.
    """
    if settings.push_to_hub is not None:
        raise SpecError("--push-to-hub: tokens are for one tokenizer on one disk. Upload the rows themselves.")
    source, tokenizer = settings.data, load_tokenizer(settings.tokenizer)
    if settings.block_size is not None and (tokenizer is None or tokenizer.eos_token_id is None):
        raise SpecError(
            "--block-size puts the end token between rows, and the tokenizer has none. Give another --tokenizer."
        )
    name = source if isinstance(source, str | Path) else type(source).__name__
    check_same_result(settings, "tokenize", None, _TOKENIZE_WITHOUT_EFFECT)
    if not (settings.out / RECORD).exists():
        claim_result(settings, "tokenize", None)
    data = tokenize_source(
        source,
        tokenizer,
        max_length=settings.max_length,
        name=str(name),
        chat=settings.chat,
        split=settings.split,
        folder=settings.out / _TOKENS,
        workers=settings.workers,
        **settings.reading,
    )
    check_same_result(settings, "tokenize", data.fingerprint, _TOKENIZE_WITHOUT_EFFECT)
    claim_result(settings, "tokenize", data.fingerprint)
    if settings.block_size is None:
        names = _columns(data)
        rows, tokens, targets = _write_tokens(settings.out / FILE, names, len(data), _token_rows(data, names))
        note = f"{int(np.sum(data.truncated)):,} rows were cut"
    else:
        blocks = _block_rows(data, settings.block_size, tokenizer)
        expected = -(-int(data.lengths.sum()) // settings.block_size)
        rows, tokens, targets = _write_tokens(settings.out / FILE, _BLOCK_COLUMNS, expected, blocks)
        note = f"{len(data):,} rows in blocks of {settings.block_size:,}"
    _finish_record(settings, "tokenize", data.fingerprint, {"rows": rows, "tokens": tokens, "targets": targets})
    remove_tree(settings.out / _TOKENS)
    notes = (f"{tokens:,} tokens, {targets:,} of them to learn; {note}.",)
    return Prepared("tokenize", settings.out, rows, notes=notes, file=FILE)


def _write_tokens(path: Path, names: Sequence[str], expected: int, rows: Iterator[dict[str, Any]]) -> tuple[int, ...]:
    """Write rows as Parquet, some at a time; the file is there whole or as it was before.

    Returns:
        How many rows, tokens and targets it holds.
    """
    unfinished = temporary_path(path)
    texts = [(name, pa.string()) for name in names]
    schema = pa.schema([*texts, ("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32()))])
    count = tokens = targets = 0
    try:
        with parquet.ParquetWriter(unfinished, schema) as writer, progress(expected, "Writing", unit="rows") as bar:
            while some := list(islice(rows, _ROWS)):
                writer.write_table(pa.Table.from_pylist(some, schema))
                bar.advance(len(some))
                count += len(some)
                tokens += sum(len(row["input_ids"]) for row in some)
                targets += sum(int((row["labels"] != NO_TARGET).sum()) for row in some)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return count, tokens, targets


def _columns(data: TokenizedData) -> list[str]:
    """Return names of the columns beside the tokens, in the order in which they are met."""
    names = dict.fromkeys(["id"])
    for example in data.examples:
        names |= dict.fromkeys(_beside_tokens(example))
    return list(names)


def _beside_tokens(example: Example) -> dict[str, Any]:
    """Return the row without its tokens, and without the columns that its labels say everything of."""
    kept = find_unused_columns(example) if "input_ids" in example.extra else set(example.extra)
    return {name: cell for name, cell in row_of(example).items() if name not in example.extra or name in kept}


def _token_rows(data: TokenizedData, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    for example, ids, mask in zip(data.examples, data.input_ids, data.targets, strict=True):
        row = _beside_tokens(example)
        yield {name: _text(row.get(name)) for name in names} | _token_columns(ids, mask)


def _block_rows(data: TokenizedData, size: int, tokenizer: Any) -> Iterator[dict[str, Any]]:
    for number, block in enumerate(pack_blocks(data, size, int(tokenizer.eos_token_id))):
        common = block.sources.most_common(1)
        yield {
            "id": f"block-{number}",
            "text": tokenizer.decode(block.input_ids.tolist()),
            "source": common[0][0] if common else None,
            "sources": _text(dict(block.sources)) if common else None,
            "rows": _text(block.rows),
        } | _token_columns(block.input_ids, block.targets)


def _token_columns(ids: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    return {"input_ids": ids, "labels": np.where(mask, ids, NO_TARGET).astype(np.int32)}


def _text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)
