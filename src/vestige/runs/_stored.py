"""The tables of a run on disk, read when first used and checked: what a user or another program may have damaged."""

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import pyarrow as pa

from vestige.errors import CorruptFile
from vestige.runs._dense import open_dense
from vestige.runs._listed import ComponentScore, ScoreRow, TokenScore, relative_strength
from vestige.runs._record import RunRecord
from vestige.runs._summary import RankedScore
from vestige.runs._tables import MEASURED, SCHEMAS
from vestige.runs._words import Listed, Question, make_listed, make_question, turns_of
from vestige.tables import read_table

REMEDY = "Run `vestige attribute` again."
PartTable = Literal["components", "tokens"]
_PARTS = {"components": ComponentScore, "tokens": TokenScore}
_REQUIRED = {
    "scores": ("query_id", "end", "rank", "example_id", "row", "score"),
    "queries": ("query_id", "row"),
    "examples": ("example_id", "row"),
    "verbatim": [name for name in SCHEMAS["verbatim"].names if name not in ("source", *MEASURED)],
}
"""Columns that must be there and hold no null; of the other tables, all."""


@final
class StoredTables:
    """The tables of one run."""

    def __init__(self, folder: Path, run: RunRecord) -> None:
        self._folder, self._run = folder, run
        self._parts: dict[str, dict[tuple[str, str], list[Any]]] = {}

    def has(self, name: str) -> bool:
        """Return whether the run has this table; one that a killed command was about to count in, it lacks."""
        return name not in self._run.missing and (self._folder / f"{name}.parquet").is_file()

    def read(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """Return a table, or some columns of it."""
        return read_run_table(self._folder, name, columns)

    @cached_property
    def queries(self) -> dict[str, Question]:
        """The queries by id, in order."""
        rows = sorted(self.read("queries").to_pylist(), key=lambda row: row["row"])
        return {row["query_id"]: make_question(row) for row in rows}

    @cached_property
    def examples(self) -> dict[int, Listed]:
        """The listed examples by their position in the training data."""
        return {row["row"]: make_listed(row) for row in self.read("examples").to_pylist()}

    @cached_property
    def ranking(self) -> dict[tuple[str, str], list[ScoreRow]]:
        """The rows of `scores.parquet` by query and end, best first; each has its query and its example."""
        found: dict[tuple[str, str], list[dict[str, Any]]] = {}
        file = self._folder / "scores.parquet"
        for row in sorted(self.read("scores").to_pylist(), key=lambda row: row["rank"]):
            if row["query_id"] not in self.queries:
                raise CorruptFile(f"{file} names {row['query_id']!r}, and queries.parquet lacks it. {REMEDY}")
            if row["row"] not in self.examples:
                raise CorruptFile(f"{file} names row {row['row']}, and examples.parquet lacks it. {REMEDY}")
            found.setdefault((row["query_id"], row["end"]), []).append(row)
        highest = {query: rows[0]["score"] for (query, end), rows in found.items() if end == "proponent"}
        return {
            (query, end): [self._describe(row, highest.get(query, 0.0)) for row in rows]
            for (query, end), rows in found.items()
        }

    def _describe(self, row: dict[str, Any], highest: float) -> ScoreRow:
        found, words = self.examples[row["row"]], self.examples[row["row"]].wording
        fields = (row["rank"], row["example_id"], row["score"], row["percentile"], words.whole, found.source)
        return ScoreRow(*fields, found.row, words.messages, relative_strength(row["score"], highest))

    @cached_property
    def dense_ids(self) -> list[str]:
        """Ids of all training examples, in order, of a run with all scores."""
        return list(open_dense(self._folder).example_ids())

    def parts(self, name: PartTable) -> dict[tuple[str, str], list[Any]] | None:
        """Return `ComponentScore`s or `TokenScore`s by query and listed example; None in a run without the table.

        The tables name examples by their ids: where listed ones share an id, their parts are left out.
        """
        if not self.has(name):
            return None
        if name not in self._parts:
            kind = _PARTS[name]
            table, uses = self.read(name), Counter(each.id for each in self.examples.values())
            columns = (table[column].to_pylist() for column in ("query_id", "example_id", *kind._fields))
            pairs = self._parts[name] = {}
            for query, example, *part in zip(*columns, strict=True):
                if uses[example] == 1:
                    pairs.setdefault((query, example), []).append(kind(*part))
        return self._parts[name]


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
    schema = SCHEMAS[name]
    table = read_table(path, schema, REMEDY, required=_REQUIRED.get(name, schema.names), columns=columns)
    if "score" in table.column_names and len(bad := np.flatnonzero(~np.isfinite(table["score"].to_numpy()))):
        score = table["score"][int(bad[0])]
        raise CorruptFile(f"{path}, row {bad[0]}: the score is {score}, no finite number. {REMEDY}")
    if {"messages", "tokens", "targets"} <= set(table.column_names):
        cells = (table[column].to_pylist() for column in ("messages", "tokens", "targets"))
        for row, (messages, tokens, targets) in enumerate(zip(*cells, strict=True)):
            if fault := _fault(messages, tokens, targets):
                raise CorruptFile(f"{path}, row {row}: {fault}. {REMEDY}")
    return table


def read_ranked(folder: Path, queries: Sequence[str]) -> list[RankedScore]:
    """Return the listed scores of a run, as they were when it was written.

    Args:
        folder: Of the run.
        queries: Ids of its queries, in order.

    Raises:
        CorruptFile: The table is missing or damaged.
    """
    numbers = {name: number for number, name in enumerate(queries)}
    names = ("end", "rank", "row", "score", "percentile")
    rows = read_run_table(folder, "scores").to_pylist()
    return [RankedScore(numbers[row["query_id"]], **{name: row[name] for name in names}) for row in rows]


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
