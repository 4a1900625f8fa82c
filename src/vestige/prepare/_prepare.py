"""Rows made from rows: `vestige data split` and `vestige data tokenize`."""

import json
from collections.abc import Iterator, Sequence
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
    pack_blocks,
    text_groups,
    tokenize_source,
)
from vestige.errors import DataError, SpecError
from vestige.models import load_tokenizer
from vestige.prepare._results import (
    RECORD,
    TOKENS,
    Prepared,
    check_same_result,
    claim_result,
    fingerprint_of,
    finish_record,
    json_line,
    read_rows,
    row_of,
    write_prepared,
)
from vestige.progress import progress
from vestige.settings import SplitSettings, TokenizeSettings, with_settings
from vestige.storage import remove_tree, temporary_path, write_durably

_TOKENIZE_WITHOUT_EFFECT = frozenset({"workers"})
_FILE = "data.parquet"
_ROWS = 1000
"""Rows of tokens in memory at once."""
_BLOCK_COLUMNS = ("id", "text", "source", "sources", "rows")
"""`source` has most of a block's tokens, `sources` says how many each has, and `rows` are the ids of its documents."""


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
        write_durably(settings.out / f"{name}.jsonl", map(json_line, held))
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
        folder=settings.out / TOKENS,
        workers=settings.workers,
        **settings.reading,
    )
    check_same_result(settings, "tokenize", data.fingerprint, _TOKENIZE_WITHOUT_EFFECT)
    claim_result(settings, "tokenize", data.fingerprint)
    if settings.block_size is None:
        names = _columns(data)
        rows, tokens, targets = _write_tokens(settings.out / _FILE, names, len(data), _token_rows(data, names))
        note = f"{int(np.sum(data.truncated)):,} rows were cut"
    else:
        blocks = _block_rows(data, settings.block_size, tokenizer)
        expected = -(-int(data.lengths.sum()) // settings.block_size)
        rows, tokens, targets = _write_tokens(settings.out / _FILE, _BLOCK_COLUMNS, expected, blocks)
        note = f"{len(data):,} rows in blocks of {settings.block_size:,}"
    finish_record(settings, "tokenize", data.fingerprint, {"rows": rows, "tokens": tokens, "targets": targets})
    remove_tree(settings.out / TOKENS)
    notes = (f"{tokens:,} tokens, {targets:,} of them to learn; {note}.",)
    return Prepared("tokenize", settings.out, rows, notes=notes, file=_FILE)


def _write_tokens(path: Path, names: Sequence[str], expected: int, rows: Iterator[dict[str, Any]]) -> tuple[int, ...]:
    """Write rows as Parquet, whole or not at all, and return how many rows, tokens and targets there are."""
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
