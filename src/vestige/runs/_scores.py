"""`Scores`: a run directory, opened for queries. Needs neither the model nor torch."""

import difflib
import html
import operator
import shutil
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, overload

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from vestige.errors import CorruptFile, MissingExtra, UserError
from vestige.runs._dense import open_dense
from vestige.runs._record import Meaning, RunRecord, read_record
from vestige.runs._summary import End
from vestige.runs._tables import REMEDY, read_run_table, turns_of
from vestige.tables import reading
from vestige.terminal import shorten

if TYPE_CHECKING:
    import pandas


PLAIN_WIDTH = 120
"""Columns used where the width of the terminal is not known."""
NARROWEST_TEXT = 20
_NARROWEST_TURN = 10
_BETWEEN = " | "
_SYSTEM = ("system", "developer")


class ScoreRow(NamedTuple):
    """One ranked training example."""

    rank: int
    """1-based, counted from the requested end of the ranking."""
    example_id: str
    score: float
    percentile: float | None
    """Share of all training examples with a smaller score, in percent; None where it is not known."""
    text: str
    """The whole text; it is shortened only where the table is printed."""
    source: str | None
    row: int
    """Position in the training data."""
    turns: tuple[tuple[str, str], ...] = ()
    """Role and content of each turn of a conversation."""


Row = TypeVar("Row")


class ScoreTable(Sequence[Row]):
    """Rows of a ranking: a sequence that prints as a table."""

    def __init__(
        self,
        rows: Sequence[Row],
        headings: Sequence[str],
        cells: Callable[[Row], tuple[Any, ...]],
        title: str,
        note: str = "",
    ) -> None:
        self._rows, self._headings, self._cells = tuple(rows), headings, cells
        self.title = title
        self.note = note
        """What the table leaves out; empty when nothing."""

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> "ScoreTable[Row]": ...
    def __getitem__(self, index: int | slice) -> "Row | ScoreTable[Row]":
        if isinstance(index, slice):
            return ScoreTable(self._rows[index], self._headings, self._cells, self.title, self.note)
        return self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)

    def __str__(self) -> str:
        cells = [self._cells(row) for row in self._rows]
        width = shutil.get_terminal_size((PLAIN_WIDTH, 24)).columns
        return "\n".join(line for line in (self.title, *_align(self._headings, cells, width), self.note) if line)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{html.escape(name)}</th>" for name in self._headings)
        body = "".join(
            "<tr>"
            + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
            + f'<td style="text-align:left">{html.escape(excerpt(words, 200))}</td></tr>'
            for *cells, words in map(self._cells, self._rows)
        )
        caption = html.escape(" ".join(part for part in (self.title, self.note) if part))
        return f"<table><caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


_HEADINGS = ("rank", "example", "score", "percentile", "text")
Words = str | Sequence[tuple[str, str]]
"""A text, or the turns of a conversation."""


def _cells(row: ScoreRow) -> tuple[Any, ...]:
    percentile = "" if row.percentile is None else f"{row.percentile:.1f}"
    return str(row.rank), shorten(row.example_id), f"{row.score:+.4g}", percentile, row.turns or row.text


def _align(headings: Sequence[str], rows: Sequence[Sequence[Any]], width: int) -> list[str]:
    """Align lines with numbers to the right, and cut the last column to what is left of `width`."""
    leading = [max(len(row[column]) for row in (headings, *rows)) for column in range(len(headings) - 1)]
    left = max(NARROWEST_TEXT, width - sum(leading) - 2 * len(leading))
    return [
        "  ".join([*(cell.rjust(size) for cell, size in zip(row, leading, strict=False)), excerpt(row[-1], left)])
        for row in (headings, *rows)
    ]


def excerpt(words: Words, width: int) -> str:
    """Return a text, or the turns of a conversation, on one line of about `width` characters.

    Each turn has its role before it and an equal share of the line, what one leaves going to those after it. A leading
    system turn, which many conversations share, and what stands between the first two turns and the last are left out.
    """
    if isinstance(words, str):
        lines = (" ".join(line.split()) for line in words.splitlines())
        return shorten(_BETWEEN.join(line for line in lines if line), width)
    turns = words[1:] if words[0][0] in _SYSTEM and len(words) > 1 else words
    parts = [f"{role}: {' '.join(content.split())}" for role, content in turns]
    parts = parts if len(parts) < 4 else [*parts[:2], "…", parts[-1]]
    left = max(width - len(_BETWEEN) * (len(parts) - 1), _NARROWEST_TURN * len(parts))
    shown: list[str] = []
    for place, part in enumerate(parts):
        share = left // (len(parts) - place)
        after = sum(min(len(each), share) for each in parts[place + 1 :])
        shown.append(shorten(part, left - after))
        left -= len(shown[-1])
    return _BETWEEN.join(shown)


class ComponentScore(NamedTuple):
    """Contribution of one component to the score of one pair."""

    component: str
    score: float


class TokenScore(NamedTuple):
    """Contribution to a pair's score of learning to predict one token of the training example."""

    position: int
    token: str
    score: float


class SelfInfluence(NamedTuple):
    """The score of a training example for itself."""

    example_id: str
    row: int
    score: float


SELF_TABLE = "self_influence"
_TITLE_WIDTH = 100


class Scores:
    """The scores of a run: `top` and `bottom` of every query's ranking, and what they are made of.

        scores = Scores.open("run")
        print(scores.meaning.sign)
        print(scores.top(query=0, k=10))

    A query is given by its position (an int) or by its id (a str). Tables are read when first used.
    """

    def __init__(self, folder: Path, run: RunRecord) -> None:
        self.folder = folder
        self.run = run
        """Everything in `run.json`."""

    @classmethod
    def open(cls, folder: str | Path) -> "Scores":
        """Open the scores in a run directory.

        Raises:
            UserError: `folder` is not a run, or a newer Vestige wrote it.
            CorruptFile: one of its files is damaged.
        """
        return cls(Path(folder), read_record(folder))

    @property
    def meaning(self) -> Meaning:
        """Sign, unit, target and normalisation of every score of this run."""
        return self.run.meaning

    @cached_property
    def queries(self) -> list[str]:
        """Ids of the queries, in order."""
        return [str(row["query_id"]) for row in self._query_rows]

    @property
    def generated(self) -> int:
        """Return how many of the queries are answers that the model gave itself."""
        return sum(bool(row.get("generated")) for row in self._query_rows)

    def top(self, query: int | str = 0, k: int = 10) -> ScoreTable[ScoreRow]:
        """Return the `k` proponents of a query: the training examples with the highest scores, highest first."""
        return self._end(query, "proponent", k)

    def bottom(self, query: int | str = 0, k: int = 10) -> ScoreTable[ScoreRow]:
        """Return the `k` opponents of a query: the training examples with the lowest scores, lowest first."""
        return self._end(query, "opponent", k)

    def components(self, query: int | str, example_id: str) -> list[ComponentScore]:
        """Split the score of a listed example over the model's components: the parts add up to it.

        Raises:
            UserError: the method has no components, or the pair is not among the listed ones.
        """
        without = f"The method `{self.run.method}` does not split scores by component."
        rows = self._pair("components", query, example_id, without)
        return [ComponentScore(row["component"], row["score"]) for row in rows]

    def tokens(self, query: int | str, example_id: str) -> list[TokenScore]:
        """Split the score of a listed example over its tokens: the parts add up to it; in order of position.

        A token's score is the effect of learning to predict that token, not of reading it. Tokens that are
        not predicted in training (a prompt's) score zero and are left out.

        Raises:
            UserError: no token scores were requested, or the pair is not among the listed ones.
        """
        rows = self._pair("tokens", query, example_id, "Run `vestige attribute` again with --tokens.")
        ordered = sorted(rows, key=lambda row: row["position"])
        return [TokenScore(row["position"], row["token"], row["score"]) for row in ordered]

    def dense(self) -> Float[np.ndarray, "query example"]:
        """Return all scores, float32, in the order of the queries and of the training data.

        Raises:
            UserError: the run keeps only the ends of each ranking.
            CorruptFile: the file is damaged.
        """
        return open_dense(self.folder).read()

    def self_influence(self) -> list[SelfInfluence]:
        """Return the score of every training example for itself, highest first: rare and mislabelled ones stand out.

        Raises:
            UserError: the run has none.
        """
        return [SelfInfluence(**row) for row in self._self_influence().to_pylist()]

    def self_scores(self) -> Float[np.ndarray, "example"]:
        """Return the same as an array in the order of the training data; NaN for examples left out.

        Raises:
            UserError: the run has none.
        """
        table = self._self_influence(("row", "score"))
        scores = np.full(self.run.data.examples, np.nan)
        with reading(self.folder / f"{SELF_TABLE}.parquet", REMEDY):
            scores[table["row"].to_numpy()] = table["score"].to_numpy()
        return scores

    def to_pandas(self) -> "pandas.DataFrame":
        """Return both ends of every ranking with their texts, as a pandas data frame.

        Raises:
            MissingExtra: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise MissingExtra("Data frames need pandas.\nType: pip install pandas") from error
        frame = pandas.DataFrame(self._read("scores").to_pydict())
        texts = [self._examples[row] for row in frame["row"]]
        return frame.assign(text=[text[0] for text in texts], source=[text[1] for text in texts])

    def __repr__(self) -> str:
        run = self.run
        lines = [f"Scores of {len(self.queries)} queries against {run.data.examples} examples by {run.method}"]
        words = [excerpt(_words_of(row), 90) for row in self._query_rows[:5]]
        lines += [f"  {number}: {shown}" for number, shown in enumerate(words)]
        if len(self.queries) > 5:
            lines.append(f"  … and {len(self.queries) - 5} more")
        return "\n".join(line for line in (*lines, self.meaning.sign, run.describe_missing()) if line)

    def _end(self, query: int | str, end: End, k: int) -> ScoreTable[ScoreRow]:
        name = self._query_id(query)
        listed = [row for row in self._ranking if row["query_id"] == name and row["end"] == end]
        listed.sort(key=lambda row: row["rank"])
        rows = [self._score_row(row) for row in listed[:k]]
        kept = len(listed)
        # Where sources are scored, there are fewer columns than training examples.
        summary = self.run.distribution.get(name)
        scored = summary.count if summary is not None else self.run.data.examples
        note = f"(the run lists {kept} of {scored})" if kept < min(k, scored) else ""
        row = self._query_rows[self.queries.index(name)]
        words = excerpt(_words_of(row), _TITLE_WIDTH)
        return ScoreTable(rows, _HEADINGS, _cells, f"{end}s of query {shorten(name)}: {words}", note)

    def _score_row(self, row: dict[str, Any]) -> ScoreRow:
        text, source, turns = self._example(row["row"])
        return ScoreRow(
            row["rank"], row["example_id"], row["score"], row["percentile"], text, source, row["row"], turns
        )

    def _query_id(self, query: int | str) -> str:
        if isinstance(query, str):
            if query in self.queries:
                return query
            close = difflib.get_close_matches(query, self.queries, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise UserError(
                f"No query has the id {query!r}.{hint}\n"
                f"Give an id from `scores.queries`, or a position from 0 to {len(self.queries) - 1}."
            )
        position = operator.index(query)
        if not -len(self.queries) <= position < len(self.queries):
            raise UserError(
                f"There is no query number {position}: the run has {len(self.queries)}, counted from 0 "
                f"(the last is {len(self.queries) - 1})."
            )
        return self.queries[position]

    @cached_property
    def _query_rows(self) -> list[dict[str, Any]]:
        return sorted(self._read("queries").to_pylist(), key=lambda row: row["row"])

    @cached_property
    def _ranking(self) -> list[dict[str, Any]]:
        return self._read("scores").to_pylist()

    @cached_property
    def _examples(self) -> dict[int, tuple[str, str | None, tuple[tuple[str, str], ...]]]:
        """Row -> (text, source, turns)."""
        rows = self._read("examples").to_pylist()
        return {row["row"]: (row_text(row), row["source"], turns_of(row["messages"])) for row in rows}

    def _example(self, row: int) -> tuple[str, str | None, tuple[tuple[str, str], ...]]:
        if row not in self._examples:
            raise CorruptFile(f"{self.folder / 'examples.parquet'} lacks row {row}, which has a score. {REMEDY}")
        return self._examples[row]

    @cached_property
    def _pairs(self) -> dict[str, dict[tuple[str, str], list[dict[str, Any]]]]:
        return {}

    def _pair(self, name: str, query: int | str, example_id: str, without: str) -> list[dict[str, Any]]:
        """Return the rows of an optional table for one query and example."""
        if not self._has(name):
            raise UserError(f"{self.folder} holds no {name[:-1]} scores. {self.run.describe_missing() or without}")
        if name not in self._pairs:
            pairs = self._pairs.setdefault(name, {})
            for row in self._read(name).to_pylist():
                pairs.setdefault((row["query_id"], row["example_id"]), []).append(row)
        found = self._pairs[name].get((self._query_id(query), example_id))
        if found is None:
            raise UserError(
                f"Example {example_id!r} is not among the listed examples of query {self._query_id(query)!r}.\n"
                "Give an example_id from `scores.top(query)` or `scores.bottom(query)`."
            )
        return found

    def _self_influence(self, columns: Sequence[str] | None = None) -> pa.Table:
        if not self._has(SELF_TABLE):
            advice = self.run.describe_missing() or "Run `vestige attribute` again with --self-influence."
            raise UserError(f"{self.folder} holds no self-influence.\n{advice}")
        return read_run_table(self.folder, SELF_TABLE, columns)

    def _has(self, name: str) -> bool:
        """Return whether the run has this table; one that a killed command was about to count in, it lacks."""
        return name not in self.run.missing and (self.folder / f"{name}.parquet").is_file()

    def _read(self, name: str) -> pa.Table:
        return read_run_table(self.folder, name)


def _words_of(row: dict[str, Any]) -> Words:
    return turns_of(row["messages"]) or row_text(row)


def row_text(row: dict[str, Any]) -> str:
    """Return the text of a row of `examples.parquet` or `queries.parquet`, turns and parts on lines of their own."""
    if turns := turns_of(row["messages"]):
        return "\n".join(f"{role}: {content}" for role, content in turns)
    if row["text"] is not None:
        return row["text"]
    parts = [part for part in (row["prompt"], row["completion"]) if part]
    # Examples given as tokens alone are read from those.
    return "\n".join(parts) if parts else "".join(row["tokens"] or ())
