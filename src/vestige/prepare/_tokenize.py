"""`vestige data tokenize`: the rows with their tokens."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet

from vestige.data import NO_TARGET, Example, TokenizedData, find_unused_columns, tokenize_source
from vestige.errors import SpecError
from vestige.models import load_tokenizer
from vestige.prepare._results import (
    FILE,
    RECORD,
    TOKENS,
    Prepared,
    check_same_result,
    claim_result,
    finish_record,
    row_of,
)
from vestige.progress import progress
from vestige.settings import TokenizeSettings, with_settings
from vestige.storage import remove_tree, temporary_path

_WITHOUT_EFFECT = frozenset({"workers"})
_ROWS = 1000
"""Rows of tokens in memory at once."""


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
    name = source if isinstance(source, str | Path) else type(source).__name__
    check_same_result(settings, "tokenize", None, _WITHOUT_EFFECT)
    if not (settings.out / RECORD).exists():
        claim_result(settings, "tokenize", None)
    data = tokenize_source(
        source,
        tokenizer,
        max_length=settings.max_length,
        name=str(name),
        chat=settings.chat,
        limit=settings.limit,
        split=settings.split,
        folder=settings.out / TOKENS,
        workers=settings.workers,
        on_bad_text=settings.on_bad_text,
    )
    check_same_result(settings, "tokenize", data.fingerprint, _WITHOUT_EFFECT)
    claim_result(settings, "tokenize", data.fingerprint)
    _write_tokens(settings.out / FILE, data)
    tokens, targets, cut = int(data.lengths.sum()), int(data.target_counts.sum()), int(np.sum(data.truncated))
    finish_record(settings, "tokenize", data.fingerprint, {"rows": len(data), "tokens": tokens, "targets": targets})
    remove_tree(settings.out / TOKENS)
    notes = (f"{tokens:,} tokens, {targets:,} of them to learn; {cut:,} rows were cut.",)
    return Prepared("tokenize", settings.out, len(data), notes=notes, file=FILE)


def _write_tokens(path: Path, data: TokenizedData) -> None:
    """Write the rows as Parquet, some at a time; the file is there whole or as it was before."""
    names = _columns(data)
    unfinished = temporary_path(path)
    schema = pa.schema(
        [(name, pa.string()) for name in names]
        + [("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32()))]
    )
    try:
        with parquet.ParquetWriter(unfinished, schema) as writer, progress(len(data), "Writing", unit="rows") as bar:
            for rows in _chunks(data, names):
                writer.write_table(pa.Table.from_pylist(rows, schema))
                bar.advance(len(rows))
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


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


def _chunks(data: TokenizedData, names: list[str]) -> Iterator[list[dict[str, Any]]]:
    waiting: list[dict[str, Any]] = []
    for example, ids, mask in zip(data.examples, data.input_ids, data.targets, strict=True):
        row = _beside_tokens(example)
        columns = {name: _text(row.get(name)) for name in names}
        waiting.append(columns | {"input_ids": ids, "labels": np.where(mask, ids, NO_TARGET).astype(np.int32)})
        if len(waiting) == _ROWS:
            yield waiting
            waiting = []
    if waiting:
        yield waiting


def _text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)
