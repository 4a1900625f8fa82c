"""What is chosen from, and by: the rows of the data, and the scores of a run, a few numbers per example at a time."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, final

import numpy as np
from jaxtyping import Float, Int

from vestige import models
from vestige.data import Example, as_plain, load_queries, load_records, record_line, text_groups, tokenize
from vestige.errors import CorruptFile, DataError, IndexMismatch, SpecError, UserError
from vestige.indexes import Index
from vestige.runs import DenseFile, Scores, open_dense, read_run_table
from vestige.settings import SelectSettings

Columns = dict[str, Any]
Scored = Float[np.ndarray, "example"]
Best = tuple[Scored, Int[np.ndarray, "example"]]
"""For each example its best mean score over a group of queries, NaN where the run has none, and the group."""
Ranked = tuple[Int[np.ndarray, "rank"], Float[np.ndarray, "rank"]]
"""Rows and scores at the head of a ranking, best first."""
_DENSE = "scores.safetensors"


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

    def only(self, wanted: Iterable[int]) -> Iterator[tuple[int, Example, Columns]]:
        """Yield these rows with their numbers, in the order of the data."""
        left = set(wanted)
        for number, (example, columns) in enumerate(self.read() if left else ()):
            if number in left:
                left.discard(number)
                yield number, example, columns
            if not left:
                return

    def lines(self, wanted: Iterable[int], more: Mapping[int, Columns] | None = None) -> Iterator[bytes]:
        """Yield the rows as JSON lines with their own columns, their ids and `more`, in the order of the data."""
        for row, example, columns in self.only(wanted):
            yield record_line(example, columns | more[row] if more else columns)


def read_rows(settings: SelectSettings, scores: ScoreSource | None, index: Index | None) -> Rows:
    """Read the data, checked against the run and the index.

    Raises:
        SpecError: Nothing says where the data are.
        IndexMismatch: They are not what was scored or indexed.
    """
    name, read = _find_data(settings, None if scores is None else scores.run, index)
    ids, sources, digest = [], [], hashlib.sha256()

    def note_each() -> Iterator[Example]:
        for example, columns in read():
            ids.append(example.id)
            sources.append(example.source)
            digest.update(json.dumps([example.id, columns], sort_keys=True, default=as_plain).encode() + b"\n")
            yield example

    groups = text_groups(note_each())
    if not ids:
        raise DataError(f"{name} holds no rows. Give data with at least one.")
    if len(set(ids)) < len(ids):
        twice = next(one for one, count in Counter(ids).items() if count > 1)
        raise DataError(f"{name} has two rows with the id {twice!r}, so the choice would be ambiguous. Rename one.")
    rows = Rows(name, ids, sources, groups, digest.hexdigest(), read)
    if scores is not None:
        _require_scored(rows, scores)
    if index is not None:
        _require_indexed(rows, index, scores)
    return rows


def read_lengths(settings: SelectSettings, rows: Rows, index: Index | None) -> np.ndarray | None:
    """Return the tokens of each example, int64 [example]; None where they are unknown and not needed.

    Raises:
        SpecError: A budget of tokens, and nothing to count them with.
    """
    if index is not None:
        return index.lengths()
    if settings.tokenizer is not None:
        tokenizer = models.load_tokenizer(settings.tokenizer)
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


def read_targets(settings: SelectSettings, scores: ScoreSource) -> dict[str, list[int]]:
    """Return the queries of each target, in order of their first query; without `--targets` each query is a target.

    Raises:
        SpecError: Nothing says where the queries are.
        DataError: A query of the run is not among them, or has no value in the column.
    """
    if settings.targets is None:
        return {name: [number] for number, name in enumerate(scores.queries)}
    source = settings.queries if settings.queries is not None else scores.run.run.config.get("queries")
    if source is None or (isinstance(source, str) and source.startswith("<")):
        raise SpecError("The run's queries were given in a Python program. Give --queries FILE beside --targets.")
    column = settings.targets
    own = column in ("source", "label", "id")
    given = load_queries(source, may_be_prompts=False, focus="read", on_bad_text=settings.on_bad_text)
    values = {example.id: getattr(example, column) if own else example.extra.get(column) for example in given}
    if absent := [name for name in scores.queries if name not in values]:
        raise DataError(f"--queries has no query {absent[0]!r}, which the run has scores for. Give the run's queries.")
    if not any(value is not None and str(value) for value in values.values()):
        raise DataError(f"No query has a column `{column}`. Give another --targets, or leave it out.")
    found: dict[str, list[int]] = {}
    for number, name in enumerate(scores.queries):
        if values[name] is None:
            raise DataError(f"Query {name!r} has no value in the column of --targets. Give it one, or leave it out.")
        found.setdefault(str(values[name]), []).append(number)
    return found


def _find_data(
    settings: SelectSettings, run: Scores | None, index: Index | None
) -> tuple[str, Callable[[], Iterable[tuple[Example, Columns]]]]:
    config = {} if run is None else run.run.config
    data = settings.data if settings.data is not None else config.get("data")
    if data is not None and not (isinstance(data, str) and data.startswith("<")):
        reading = {"limit": config.get("limit"), "where": config.get("where"), "on_bad_text": settings.on_bad_text}
        shown = str(data) if isinstance(data, str | Path) else type(data).__name__
        return shown, lambda: load_records(data, **reading)
    folder = index.folder if index is not None else config.get("index")
    if index is None and isinstance(folder, str) and not folder.startswith("<"):
        index = Index.open(folder)
    if index is not None:
        examples = index.examples()
        return str(folder), lambda: ((example, example.columns) for example in examples)
    raise SpecError(f"{settings.scores} was made from data in a Python program. Give the same data with --data.")


def _require_scored(rows: Rows, scores: ScoreSource) -> None:
    folder = scores.run.folder
    if len(rows) != scores.examples:
        raise IndexMismatch(
            f"{folder} has scores of {scores.examples} examples, and {rows.name} holds {len(rows)}. Give the data that "
            "was scored with --data."
        )
    _require_ids(rows, scores.read_ids().items(), f"{folder} has scores of")
    for line in scores.run.top(0, 1):
        _, example, _ = next(rows.only([line.row]))
        if example.display and example.display != line.text:
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


class ScoreSource(ABC):
    """Scores of every example, or of those at the ends of the rankings."""

    def __init__(self, run: Scores) -> None:
        self.run, self.queries, self.examples = run, run.queries, run.run.data.examples

    @property
    @abstractmethod
    def reliable(self) -> int:
        """The number of the best of each ranking that are known."""

    @property
    def complete(self) -> bool:
        """True if every example that was scored is known."""
        return self.reliable >= self.examples - len(self.run.run.left_out)

    @abstractmethod
    def read_ids(self) -> dict[int, str]:
        """Return the ids of the examples whose rows the run names."""

    @abstractmethod
    def best(self, groups: Sequence[Sequence[int]]) -> Best:
        """Return the highest of the mean scores over each group of queries; the earlier group where two are equal.

        Only the `reliable` highest are certain to be the highest. Scores of examples for which one is not finite, or
        not known, are NaN.

        Raises:
            UserError: The run does not hold what this would need.
        """

    @abstractmethod
    def ranking(self, query: int, count: int, ties: Scored) -> Ranked:
        """Return the `count` best of a query, equal scores in ascending order of `ties`; fewer if no more are known."""

    def means(self) -> Scored:
        """Return the mean score of every example over all queries, float64; NaN where one of them is not finite.

        Raises:
            UserError: The run does not hold them.
        """
        if not self.complete:
            raise self.needs_all("This strategy")
        return self.best([range(len(self.queries))])[0]

    def needs_all(self, what: str) -> UserError:
        """Return the error of a run that keeps too little."""
        return UserError(
            f"{what} needs more scores than {self.run.folder} keeps: the {self.reliable} best of each query.\n"
            "Run `vestige attribute` again with --dense, or with a larger --k."
        )


@final
class _DenseScores(ScoreSource):
    """A run with all scores, read a block of examples or one query at a time."""

    def __init__(self, run: Scores, block_bytes: int) -> None:
        super().__init__(run)
        self._step = max(1, block_bytes // (8 * max(len(self.queries), 1)))

    @property
    def reliable(self) -> int:
        return self.examples

    def read_ids(self) -> dict[int, str]:
        return dict(enumerate(self._file.example_ids()))

    def best(self, groups: Sequence[Sequence[int]]) -> Best:
        score, group = np.full(self.examples, np.nan), np.zeros(self.examples, dtype=np.int64)
        for start in range(0, self.examples, self._step):
            rows = slice(start, min(start + self._step, self.examples))
            score[rows], group[rows] = _best_of(self._file.read(examples=rows), groups)
        return score, group

    def ranking(self, query: int, count: int, ties: Scored) -> Ranked:
        scores = self._file.read(queries=slice(query, query + 1))[0].astype(np.float64)
        scores[~np.isfinite(scores)] = np.nan
        return head(scores, count, ties)

    @cached_property
    def _file(self) -> DenseFile:
        file = open_dense(self.run.folder)
        if file.shape != (len(self.queries), self.examples):
            raise CorruptFile(
                f"{file.path} holds scores of {' x '.join(map(str, file.shape))}, and the run is of "
                f"{len(self.queries)} queries x {self.examples} examples. Run `vestige attribute` again."
            )
        return file


@final
class _ListedScores(ScoreSource):
    """A run that keeps only the ends of each ranking: enough where a query's best are all that is requested."""

    @property
    def reliable(self) -> int:
        return min((len(rows) for rows, _ in self._lists), default=0)

    def read_ids(self) -> dict[int, str]:
        table = read_run_table(self.run.folder, "scores", ["row", "example_id"])
        return dict(zip(table["row"].to_pylist(), table["example_id"].to_pylist(), strict=True))

    def best(self, groups: Sequence[Sequence[int]]) -> Best:
        """Compute the best means from whole rankings if short; else of targets with one query each, from the heads.

        Nothing that no head lists can be among the `reliable` highest of the single queries.
        """
        if self.complete:
            scores = np.full((len(self.queries), self.examples), np.nan)
            for query, (rows, values) in enumerate(self._lists):
                scores[query, rows] = values
            return _best_of(scores, groups)
        if any(len(group) > 1 for group in groups):
            raise self.needs_all("A mean over queries")
        score, best = np.full(self.examples, np.nan), np.zeros(self.examples, dtype=np.int64)
        for number, (query,) in enumerate(groups):
            rows, values = self._lists[query]
            better = np.isnan(score[rows]) | (values > score[rows])
            score[rows[better]], best[rows[better]] = values[better], number
        return score, best

    def ranking(self, query: int, count: int, ties: Scored) -> Ranked:
        rows, values = self._lists[query]
        order = np.lexsort((ties[rows], -values))[:count]
        return rows[order], values[order]

    @cached_property
    def _lists(self) -> list[Ranked]:
        """The proponents of each query."""
        table = read_run_table(self.run.folder, "scores", ["query_id", "end", "row", "score"])
        number = {name: number for number, name in enumerate(self.queries)}
        queries = np.array([number.get(name, -1) for name in table["query_id"].to_pylist()], dtype=np.int64)
        rows, scores = table["row"].to_numpy(), table["score"].to_numpy()
        if len(rows) and (queries.min() < 0 or rows.min() < 0 or rows.max() >= self.examples):
            raise CorruptFile(
                f"{self.run.folder / 'scores.parquet'} names queries or rows that the run does not have. "
                "Run `vestige attribute` again."
            )
        top = np.array([end == "proponent" for end in table["end"].to_pylist()], dtype=bool)
        own = [top & (queries == query) for query in range(len(self.queries))]
        return [(rows[mask], scores[mask]) for mask in own]


def open_scores(folder: Path, *, block_bytes: int = 64 * 2**20) -> ScoreSource:
    """Open the scores of a run, read in blocks of at most `block_bytes` where all are there.

    Raises:
        UserError: There is no run.
    """
    run = Scores.open(folder)
    return _DenseScores(run, block_bytes) if (run.folder / _DENSE).is_file() else _ListedScores(run)


def head(scores: Scored, count: int, ties: Scored) -> Ranked:
    """Return the `count` highest of the scores that are numbers, equal ones in ascending order of `ties`."""
    rows = np.flatnonzero(~np.isnan(scores))
    if count < len(rows):
        # All ties with the last one stay in the race: their order decides, not their position.
        least = np.partition(scores[rows], -count)[-count]
        rows = rows[scores[rows] >= least]
    order = rows[np.lexsort((ties[rows], -scores[rows]))][:count]
    return order, scores[order]


def _best_of(scores: Float[np.ndarray, "query row"], groups: Sequence[Sequence[int]]) -> Best:
    """Return for each row the highest mean over a group of queries, added up in float64, and the first such group."""
    means = np.stack([scores[list(group)].mean(0, dtype=np.float64) for group in groups])
    usable = np.isfinite(means).all(0)
    means = np.where(usable, means, 0.0)
    return np.where(usable, means.max(0), np.nan), means.argmax(0)
