"""The examples that are chosen from: ids and columns, read from where the scores came from."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from vestige.data import Example, load_queries, load_records, text_groups, tokenize
from vestige.errors import DataError, IndexMismatch, SpecError
from vestige.indexes import Index
from vestige.models import load_tokenizer
from vestige.runs import Scores
from vestige.selection._scores import ScoreSource
from vestige.settings import SelectSettings

Columns = dict[str, Any]


@dataclass(frozen=True)
class Rows:
    """A data set whose rows are read again for each use, so that only ids stay in memory."""

    name: str
    ids: list[str]
    sources: list[str | None]
    groups: Int[np.ndarray, "example"]
    """The same number for copies of one text."""
    digest: str
    """sha256 over ids and columns."""
    read: Callable[[], Iterable[tuple[Example, Columns]]]

    def __len__(self) -> int:
        return len(self.ids)

    def text_names(self) -> list[str]:
        """Return a name of each row's text, the same for its copies whatever the order of the data: their first id."""
        names: dict[int, str] = {}
        for name, group in zip(self.ids, self.groups.tolist(), strict=True):
            names[group] = min(names.get(group, name), name)
        return [names[group] for group in self.groups.tolist()]


def read_rows(settings: SelectSettings, scores: ScoreSource | None, index: Index | None) -> Rows:
    """Read the data, checked against the run and the index.

    Raises:
        SpecError: Nothing says where the data are.
        IndexMismatch: They are not what was scored or indexed.
    """
    name, read = _source(settings, None if scores is None else scores.run, index)
    ids, sources, digest = [], [], hashlib.sha256()

    def noted() -> Iterator[Example]:
        for example, columns in read():
            ids.append(example.id)
            sources.append(example.source)
            digest.update(json.dumps([example.id, columns], sort_keys=True, default=_plain).encode() + b"\n")
            yield example

    groups = text_groups(noted())
    _require_distinct(name, ids)
    rows = Rows(name, ids, sources, groups, digest.hexdigest(), read)
    if scores is not None:
        _require_scored(rows, scores)
    if index is not None:
        _require_indexed(rows, index, scores)
    return rows


def row_lengths(settings: SelectSettings, rows: Rows, index: Index | None) -> np.ndarray | None:
    """Return the tokens of each example, int64 [example]; None where they are unknown and not needed.

    Raises:
        SpecError: A budget of tokens, and nothing to count them with.
    """
    if index is not None:
        return index.lengths()
    if settings.tokenizer is not None:
        tokenizer = load_tokenizer(settings.tokenizer)
        examples = [example for example, _ in rows.read()]
        return tokenize(examples, tokenizer, max_length=None, name=rows.name).lengths
    given = [len(columns["input_ids"]) if "input_ids" in columns else -1 for _, columns in rows.read()]
    if min(given) >= 0:
        return np.array(given, dtype=np.int64)
    if settings.amount.unit == "tokens":
        raise SpecError(
            f"--budget '{settings.budget}' has to count tokens. Give --index IDX, which holds every length, or "
            "--tokenizer MODEL."
        )
    return None


def query_values(settings: SelectSettings, scores: ScoreSource) -> Callable[[str], str | None]:
    """Return the map from the id of a query to its value in the column of `--targets`.

    Raises:
        SpecError: Nothing says where the queries are.
        DataError: No query has such a column, or one of the run is not among them.
    """
    source = settings.queries if settings.queries is not None else scores.run.run.config.get("queries")
    if source is None or (isinstance(source, str) and source.startswith("<")):
        raise SpecError("The run's queries were given in a Python program. Give --queries FILE beside --targets.")
    column = str(settings.targets)
    given = load_queries(source, may_be_prompts=False, on_bad_text=settings.on_bad_text)
    values = {example.id: _value(example, column) for example in given}
    if absent := [name for name in scores.queries if name not in values]:
        raise DataError(f"--queries has no query {absent[0]!r}, which the run has scores for. Give the run's queries.")
    if not any(values.values()):
        raise DataError(f"No query has a column `{column}`. Give another --targets, or leave it out.")
    return values.__getitem__


def _value(example: Example, column: str) -> str | None:
    value = getattr(example, column) if column in ("source", "label", "id") else example.extra.get(column)
    return None if value is None else str(value)


def _source(
    settings: SelectSettings, run: Scores | None, index: Index | None
) -> tuple[str, Callable[[], Iterable[tuple[Example, Columns]]]]:
    config = {} if run is None else run.run.config
    data = settings.data if settings.data is not None else config.get("data")
    if data is not None and not (isinstance(data, str) and data.startswith("<")):
        limit = config.get("limit")
        shown = str(data) if isinstance(data, str | Path) else type(data).__name__
        return shown, lambda: load_records(data, limit=limit, on_bad_text=settings.on_bad_text)
    folder = index.folder if index is not None else config.get("index")
    if index is None and isinstance(folder, str) and not folder.startswith("<"):
        index = Index.open(folder)
    if index is not None:
        examples = index.examples()
        return str(folder), lambda: ((example, _columns(example)) for example in examples)
    raise SpecError(f"{settings.scores} was made from data in a Python program. Give the same data with --data.")


def _columns(example: Example) -> Columns:
    """Return an example that was stored with an index, as a row that reads as the same example."""
    turns = [turn.columns for turn in example.messages]
    found = {
        "id": example.id,
        "text": example.text,
        "prompt": example.prompt,
        "completion": example.completion,
        "messages": turns or None,
        "source": example.source,
        "label": example.label,
    }
    return {name: value for name, value in (found | example.extra).items() if value is not None}


def _require_distinct(name: str, ids: list[str]) -> None:
    if not ids:
        raise DataError(f"{name} holds no rows. Give data with at least one.")
    if len(set(ids)) < len(ids):
        seen: set[str] = set()
        twice = next(one for one in ids if one in seen or seen.add(one))
        raise DataError(f"{name} has two rows with the id {twice!r}, so the choice would be ambiguous. Rename one.")


def _require_scored(rows: Rows, scores: ScoreSource) -> None:
    folder = scores.run.folder
    if len(rows) != scores.examples:
        raise IndexMismatch(
            f"{folder} has scores of {scores.examples} examples, and {rows.name} holds {len(rows)}. Give the data that "
            "was scored with --data."
        )
    _require_ids(rows, scores.known_ids().items(), f"{folder} has scores of")
    listed = scores.run.top(0, 1)
    for line in listed:
        found = next(example for example, _ in _only(rows, [line.row]))
        if found.display and found.display != line.text:
            raise IndexMismatch(
                f"Row {line.row} of {rows.name} is not the text that {folder} has a score of. The data have changed: "
                "give what was scored with --data, or score again."
            )


def _require_indexed(rows: Rows, index: Index, scores: ScoreSource | None) -> None:
    if len(rows) != index.rows:
        raise IndexMismatch(f"{index.folder} holds {index.rows} examples, and {rows.name} holds {len(rows)}.")
    _require_ids(rows, enumerate(index.examples().column("id")), f"{index.folder} holds")
    scored = None if scores is None or scores.run.run.model is None else scores.run.run.data.fingerprint
    if scored and scored != index.manifest.data.fingerprint:
        raise IndexMismatch(
            f"{index.folder} was made of other tokens than the run {scores.run.folder if scores else ''}. Make both "
            "from the same data, with the same --max-length and --chat."
        )


def _require_ids(rows: Rows, known: Iterable[tuple[int, str]], what: str) -> None:
    for row, name in known:
        if row >= len(rows) or rows.ids[row] != name:
            found = rows.ids[row] if row < len(rows) else "nothing"
            raise IndexMismatch(f"{what} {name!r} in row {row}, where {rows.name} has {found!r}. Give the same data.")


def _only(rows: Rows, wanted: Sequence[int]) -> Iterator[tuple[Example, Columns]]:
    """Yield these rows, in the order of the data."""
    asked = set(wanted)
    for number, pair in enumerate(rows.read()):
        if number in asked:
            yield pair
            if number == max(asked):
                return


def lines_of(rows: Rows, wanted: Sequence[int], more: Mapping[int, Columns] | None = None) -> Iterator[bytes]:
    """Yield the rows as JSON lines with their own columns, their ids and `more`, in the order of the data."""
    for row, (example, columns) in zip(sorted(set(wanted)), _only(rows, wanted), strict=True):
        line = columns if columns.get("id") not in (None, "") else {"id": example.id} | _without_id(columns)
        line = line | more[row] if more else line
        yield (json.dumps(line, ensure_ascii=False, default=_plain) + "\n").encode()


def _without_id(columns: Columns) -> Columns:
    return {name: value for name, value in columns.items() if name != "id"}


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)
