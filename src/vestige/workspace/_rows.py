"""The training data behind a run or an index: searched for words, in pages, with the score of each row where known."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vestige.data import Example, load_examples
from vestige.errors import UserError
from vestige.indexes import Index, read_manifest
from vestige.runs import Scores, open_dense

PAGE = 50
"""Rows that are shown at once."""
LETTERS = 4000
"""Letters of a row that are shown."""
_KEPT, _SEARCHES = 3, 8
"""Data sets, and searches, whose results are kept for the next page."""

Json = dict[str, Any]


class _Data(NamedTuple):
    """Opened training data."""

    examples: Sequence[Example]
    scores: Scores | None = None
    """Of a run that has the scores of all rows."""
    queries: Sequence[Json] = ()


def find_rows(folder: Path, words: str, query: str | None, order: str, start: int) -> Json:
    """Return a page of the rows that hold the words, in any case, with their scores for every query.

    Args:
        folder: A run or an index; of a run, the data file that it names is looked for here and above it.
        words: Found as they stand, in the text or the id; all rows for none.
        query: Id of the query to order by; None for the first.
        order: "row" for the order of the data, "high" or "low" for the highest or the lowest scores first.
        start: First row of the page.

    Raises:
        UserError: The data are not there, or are not those of the run.
    """
    marker = folder / ("run.json" if read_manifest(folder) is None else "manifest.json")
    opened = folder, marker.stat().st_mtime_ns
    data, rows = _open(*opened), _search(*opened, words.strip().lower())
    if data.scores is not None and order != "row":
        rows = _sort(rows, data.scores.dense_of(query or 0), order)
    shown = rows[start : start + PAGE].tolist()
    return {
        "total": len(data.examples),
        "found": len(rows),
        "start": start,
        "page": PAGE,
        "queries": data.queries,
        "rows": [_describe(data.examples[row]) for row in shown],
        "scores": _read_scores(data.scores, shown),
    }


@lru_cache(_KEPT)
def _open(folder: Path, _: int) -> _Data:
    return _open_run(folder) if read_manifest(folder) is None else _Data(Index.open(folder).examples())


@lru_cache(_SEARCHES)
def _search(folder: Path, changed: int, words: str) -> np.ndarray:
    """Return the rows that hold the words, in the order of the data."""
    examples = _open(folder, changed).examples
    if not words:
        return np.arange(len(examples))
    rows = [row for row, one in enumerate(examples) if words in one.display.lower() or words in one.id.lower()]
    return np.array(rows, dtype=np.int64)


def _open_run(folder: Path) -> _Data:
    scores = Scores.open(folder)
    examples = _find_data(scores)
    if len(examples) != scores.run.data.examples or any(
        (row.example_id, row.text) != (examples[row.row].id, examples[row.row].display) for row in scores.all_listed()
    ):
        raise UserError(
            f"{scores.run.data.name} is not what {folder} was made from: its rows have changed since. Bring the data "
            "back, or make the run again."
        )
    queries = [{"id": each.id, "text": each.question or each.answer} for each in scores.tables.queries.values()]
    return _Data(examples, scores if scores.has_dense else None, queries)


def _find_data(scores: Scores) -> Sequence[Example]:
    """Return the rows of the data that a run was made from, out of its index or of the file that it names."""
    config, near = scores.run.config, (Path(), *scores.folder.parents)
    for name in ("index", "data"):
        given = config.get(name)
        given = given[0] if isinstance(given, list) and given else given
        places = [place / given for place in near if (place / given).exists()] if isinstance(given, str) else []
        if places and name == "index":
            return Index.open(places[0]).examples()
        if places:
            reading = {key: config[key] for key in ("limit", "where", "on_bad_text") if config.get(key) is not None}
            return load_examples(str(places[0]), **reading)
    raise UserError(
        f"{scores.run.data.name}, the training data of {scores.folder}, are not there. Start `vestige view` in the "
        "folder in which the run was made."
    )


def _sort(rows: np.ndarray, scores: np.ndarray, order: str) -> np.ndarray:
    """Return the rows by their scores; those without one at the end, equal ones in the order of the data."""
    found = scores[rows].astype(np.float64)
    return rows[np.argsort(found if order == "low" else -found, kind="stable")]


def _read_scores(scores: Scores | None, rows: Sequence[int]) -> list[list[float | None]] | None:
    """Return the scores of each row for every query, None for one that was left out; None without all scores."""
    if scores is None:
        return None
    dense = open_dense(scores.folder)
    columns = (dense.read(examples=slice(row, row + 1))[:, 0] for row in rows)
    return [[float(value) if np.isfinite(value) else None for value in column] for column in columns]


def _describe(example: Example) -> Json:
    """Return a row as it is shown: its turns, or its text as one."""
    parts = [(turn.role, turn.content) for turn in example.messages]
    if not parts:
        named = {"text": example.text, "prompt": example.prompt, "completion": example.completion}
        parts = [(name, text) for name, text in named.items() if text]
    turns = [(name, text[:LETTERS] + "…" * (len(text) > LETTERS)) for name, text in parts]
    return {"id": example.id, "row": example.row, "source": example.source, "turns": turns}
