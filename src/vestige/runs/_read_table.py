"""Tables of a run, checked as they are read: a folder may be damaged, or made by another program."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from vestige.errors import CorruptFile
from vestige.parsing import parse_json
from vestige.runs._self_influence import SELF_INFLUENCE
from vestige.runs._tables import COMPONENTS, EXAMPLES, QUERIES, SCORES, TOKENS
from vestige.tables import read_table

REMEDY = "Run `vestige attribute` again."
_SCHEMAS = {
    "scores": (SCORES, ("query_id", "end", "rank", "example_id", "row", "score")),
    "queries": (QUERIES, ("query_id", "row")),
    "examples": (EXAMPLES, ("example_id", "row")),
    "components": (COMPONENTS, tuple(COMPONENTS.names)),
    "tokens": (TOKENS, tuple(TOKENS.names)),
    "self_influence": (SELF_INFLUENCE, tuple(SELF_INFLUENCE.names)),
}
"""Schema and required columns of each table."""


def read_run_table(folder: Path, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Return the table `name` of a run; a column that is not required and not there is null.

    Args:
        folder: Of the run.
        name: Such as `scores`, without the extension.
        columns: Only these.

    Raises:
        CorruptFile: It is missing, does not read, or its cells do not hold what they should.
    """
    path = folder / f"{name}.parquet"
    schema, required = _SCHEMAS[name]
    table = read_table(path, schema, REMEDY, required=required, columns=columns)
    if "score" in table.column_names and (bad := _not_finite(table["score"])) is not None:
        raise CorruptFile(f"{path}, row {bad}: the score is {table['score'][bad]}, no finite number. {REMEDY}")
    if {"messages", "tokens", "targets"} <= set(table.column_names):
        cells = (table[column].to_pylist() for column in ("messages", "tokens", "targets"))
        for row, (messages, tokens, targets) in enumerate(zip(*cells, strict=True)):
            if fault := _fault(messages, tokens, targets):
                raise CorruptFile(f"{path}, row {row}: {fault}. {REMEDY}")
    return table


def _not_finite(scores: pa.ChunkedArray) -> int | None:
    """Return the row of the first score that is NaN or infinite."""
    bad = np.flatnonzero(~np.isfinite(scores.to_numpy()))
    return int(bad[0]) if len(bad) else None


def turns_of(cell: str | None) -> tuple[tuple[str, str], ...]:
    """Return role and content of each turn in a cell of `messages`.

    Raises:
        ValueError: It is no JSON list of turns.
    """
    turns: Any = parse_json(cell) if cell else []
    if not isinstance(turns, list) or not all(
        isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in turns
    ):
        raise ValueError("`messages` is no list of turns with role and content")
    return tuple((str(turn["role"]), str(turn["content"])) for turn in turns)


def _fault(messages: str | None, tokens: list[str] | None, targets: list[bool] | None) -> str | None:
    """Return what is wrong with the wording of a row, None if nothing."""
    try:
        turns_of(messages)
    except ValueError as error:
        return f"`messages` does not read ({error})"
    if None in (tokens or ()) or None in (targets or ()):
        return "`tokens` or `targets` has an empty entry"
    if tokens and targets and len(tokens) != len(targets):
        return f"{len(tokens)} tokens and {len(targets)} targets"
    return None
