"""`Scores`: a run directory, opened for queries. Needs neither the model nor torch."""

import difflib
import operator
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float

from vestige.errors import CorruptFile, MissingExtra, UserError
from vestige.runs._dense import open_dense
from vestige.runs._listing import ComponentScore, ScoreRow, ScoreTable, SelfInfluence, TokenScore, Words, excerpt
from vestige.runs._read_table import REMEDY, read_run_table, turns_of
from vestige.runs._record import RunRecord, read_record
from vestige.runs._topk import End
from vestige.runs._types import Meaning
from vestige.tables import reading
from vestige.terminal import shorten

if TYPE_CHECKING:
    import pandas

SELF_TABLE = "self_influence"
_ROWS_AT_ONCE = 2**13
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

    def top(self, query: int | str = 0, k: int = 10) -> ScoreTable:
        """Return the `k` proponents of a query: the training examples with the highest scores, highest first."""
        return self._end(query, "proponent", k)

    def bottom(self, query: int | str = 0, k: int = 10) -> ScoreTable:
        """Return the `k` opponents of a query: the training examples with the lowest scores, lowest first."""
        return self._end(query, "opponent", k)

    def components(self, query: int | str, example_id: str) -> list[ComponentScore]:
        """Split the score of a listed example over the model's components: the parts add up to it.

        Raises:
            UserError: the method has no components, or the pair is not among the listed ones.
        """
        rows = self._pair("components", f"The method `{self.run.method}` does not split scores by component.")
        found = rows.get((self._query_id(query), example_id))
        if found is None:
            raise self._not_listed(query, example_id)
        return [ComponentScore(row["component"], row["score"]) for row in found]

    def tokens(self, query: int | str, example_id: str) -> list[TokenScore]:
        """Split the score of a listed example over its tokens: the parts add up to it; in order of position.

        A token's score is the effect of learning to predict that token, not of reading it. Tokens that are
        not predicted in training (a prompt's) score zero and are left out.

        Raises:
            UserError: no token scores were requested, or the pair is not among the listed ones.
        """
        rows = self._pair("tokens", "Run `vestige attribute` again with --tokens.")
        found = rows.get((self._query_id(query), example_id))
        if found is None:
            raise self._not_listed(query, example_id)
        ordered = sorted(found, key=lambda row: row["position"])
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
        self._require_self_influence()
        return [SelfInfluence(**row) for row in self._read(SELF_TABLE).to_pylist()]

    def self_scores(self) -> Float[np.ndarray, "example"]:
        """Return the same as an array, in the order of the training data; NaN for examples left out.

        Raises:
            UserError: the run has none.
        """
        self._require_self_influence()
        scores = np.full(self.run.data.examples, np.nan)
        path = self.folder / f"{SELF_TABLE}.parquet"
        for part in self._parts(SELF_TABLE, ("row", "score")):
            with reading(path, REMEDY):
                scores[part["row"].to_numpy()] = part["score"].to_numpy()
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
        return "\n".join([*lines, self.meaning.sign])

    def _end(self, query: int | str, end: End, k: int) -> ScoreTable:
        name = self._query_id(query)
        listed = [row for row in self._ranking if row["query_id"] == name and row["end"] == end]
        listed.sort(key=lambda row: row["rank"])
        rows = [
            ScoreRow(
                row["rank"],
                row["example_id"],
                row["score"],
                row["percentile"],
                *self._example(row["row"])[:2],
                row["row"],
                self._example(row["row"])[2],
            )
            for row in listed[:k]
        ]
        kept = len(listed)
        # Where sources are scored, there are fewer columns than training examples.
        summary = self.run.distribution.get(name)
        scored = summary.count if summary is not None else self.run.data.examples
        note = f"(the run lists {kept} of {scored})" if kept < min(k, scored) else ""
        row = self._query_rows[self.queries.index(name)]
        words = excerpt(_words_of(row), _TITLE_WIDTH)
        return ScoreTable(rows, f"{end}s of query {shorten(name)}: {words}", note)

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

    def _not_listed(self, query: int | str, example_id: str) -> UserError:
        return UserError(
            f"Example {example_id!r} is not among the listed examples of query {self._query_id(query)!r}.\n"
            "Give an example_id from `scores.top(query)` or `scores.bottom(query)`."
        )

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

    def _pair(self, name: str, without: str) -> dict[tuple[str, str], list[dict[str, Any]]]:
        """Return rows of an optional table by (query id, example id)."""
        if not (self.folder / f"{name}.parquet").is_file():
            raise UserError(f"{self.folder} holds no {name[:-1]} scores. {without}")
        if name not in self._pairs:
            pairs = self._pairs.setdefault(name, {})
            for row in self._read(name).to_pylist():
                pairs.setdefault((row["query_id"], row["example_id"]), []).append(row)
        return self._pairs[name]

    def _require_self_influence(self) -> None:
        if not (self.folder / f"{SELF_TABLE}.parquet").is_file():
            raise UserError(
                f"{self.folder} holds no self-influence.\nRun `vestige attribute` again with --self-influence."
            )

    def _read(self, name: str) -> pa.Table:
        return read_run_table(self.folder, name)

    def _parts(self, name: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yield some columns of a table, some rows at a time."""
        path = self.folder / f"{name}.parquet"
        with reading(path, REMEDY), pq.ParquetFile(path) as file:
            yield from file.iter_batches(_ROWS_AT_ONCE, columns=list(columns))


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
