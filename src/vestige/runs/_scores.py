"""`Scores`: a run directory, opened for queries. Needs neither the model nor torch."""

import difflib
import operator
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from vestige import runs
from vestige.errors import MissingExtra, UserError
from vestige.runs._dense import open_dense
from vestige.runs._folder import read_record
from vestige.runs._listed import ComponentScore, ScoreRow, ScoreTable, SelfInfluence, TokenScore, excerpt, render_html
from vestige.runs._proofs import Proofs, VerbatimSpan, list_spans, prove
from vestige.runs._rankings import TITLE_WIDTH, Comparison, Standing, compare, list_end, list_standing
from vestige.runs._record import DENSE_FILE, Meaning, RunRecord
from vestige.runs._stored import REMEDY, PartTable, StoredTables
from vestige.runs._summary import End
from vestige.runs._tables import SCHEMAS
from vestige.runs._words import Question, Wording, Words
from vestige.storage import local_result
from vestige.tables import reading
from vestige.terminal import shorten

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

SELF_TABLE = "self_influence"
_SHOWN = 5
"""Queries that a printed run shows."""


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
        self.tables = StoredTables(folder, run)

    @classmethod
    def open(cls, folder: str | Path) -> "Scores":
        """Open the scores in a run directory.

        Raises:
            UserError: `folder` is not a run, or a newer Vestige wrote it.
            CorruptFile: one of its files is damaged.
        """
        folder = local_result(folder)
        return cls(Path(folder), read_record(folder))

    @property
    def meaning(self) -> Meaning:
        """Sign, unit, target and normalisation of every score of this run."""
        return self.run.meaning

    @cached_property
    def queries(self) -> list[str]:
        """Ids of the queries, in order."""
        return list(self.tables.queries)

    @property
    def generated(self) -> int:
        """Return how many of the queries are answers that the model gave itself."""
        return sum(query.generated for query in self.tables.queries.values())

    def top(self, query: int | str = 0, k: int = 10) -> ScoreTable[ScoreRow]:
        """Return the `k` proponents of a query: the training examples with the highest scores, highest first.

        Args:
            query: Position or id of the query.
            k: How many. Beyond those that the run lists, the rows come from all scores where the run has them, without
                texts that it lacks; else the table's note says how to get more.
        """
        return list_end(self, self.query_id(query), "proponent", k)

    def bottom(self, query: int | str = 0, k: int = 10) -> ScoreTable[ScoreRow]:
        """Return the `k` opponents of a query: the training examples with the lowest scores, lowest first.

        Args:
            query: Position or id of the query.
            k: As for `top`.
        """
        return list_end(self, self.query_id(query), "opponent", k)

    def listed(self, query: int | str, end: End) -> list[ScoreRow]:
        """Return every row that the run lists at one end of a query's ranking, best first."""
        return self.tables.ranking.get((self.query_id(query), end), [])

    def ends(self, query: int | str) -> dict[End, list[ScoreRow]]:
        """Return every row that the run lists for a query: proponents, then opponents, each best first."""
        return {end: self.listed(query, end) for end in get_args(End)}

    def all_listed(self) -> list[ScoreRow]:
        """Return every listed row of every query."""
        return [row for query in self.queries for rows in self.ends(query).values() for row in rows]

    def wording(self, row: int) -> Wording:
        """Return question and answer of a listed example, given by its position in the training data.

        Raises:
            UserError: The run does not list it.
        """
        if row not in self.tables.examples:
            raise UserError(
                f"{self.folder} lists no training row {row}. Give the `row` of one from `scores.top(query)`."
            )
        return self.tables.examples[row].wording

    def query(self, query: int | str = 0) -> Question:
        """Return a query: question, answer, what it is explained instead of or which part, and its loss.

        Args:
            query: Position or id of the query.
        """
        return self.tables.queries[self.query_id(query)]

    def ladder(self, query: int | str = 0, k: int = 10) -> ScoreTable[Standing]:
        """Return where the first proponents of a query stood at each rung, of a run with `rerank`.

        Args:
            query: Position or id of the query.
            k: How many.

        Raises:
            UserError: The run has one ranking alone.
        """
        if self.run.ladder is None:
            raise UserError(f"{self.folder} has one ranking alone.\nRun `vestige attribute` again with --rerank 50.")
        return list_standing(self.run.ladder, self.query_id(query), k)

    @property
    def has_verbatim(self) -> bool:
        """True if the run says where its answers stand word for word."""
        return self.tables.has("verbatim")

    def verbatim(self, query: int | str = 0) -> ScoreTable[VerbatimSpan]:
        """Return the parts of a query's answer that stand word for word in training rows, the rarest first.

        Args:
            query: Position or id of the query.

        Raises:
            UserError: The run was made without `verbatim`.
        """
        name = self.query_id(query)
        if not self.has_verbatim:
            advice = self.run.describe_missing() or "Run `vestige attribute` again with --verbatim."
            raise UserError(f"{self.folder} holds no verbatim spans. {advice}")
        rows = [row for row in self._spans if row["query_id"] == name]
        return list_spans(rows, name, self.run.config.get("verbatim_tokens", 4))

    def proofs(self, query: int | str = 0) -> Proofs:
        """Return what moved the model to an answer, where the answer stands, and whether it is memorized, in words.

        Args:
            query: Position or id of the query.

        Raises:
            UserError: The run was made without `verbatim`.
        """
        return prove(self, query)

    @cached_property
    def _spans(self) -> list[dict[str, Any]]:
        return self.tables.read("verbatim").to_pylist()

    @cached_property
    def words(self) -> Words:
        """The words of all listed examples and queries, by which two of them are compared."""
        return Words([each.wording for each in (*self.tables.queries.values(), *self.tables.examples.values())])

    def count_leading(self, first: int) -> Counter[int]:
        """Return for how many queries each row is among the first proponents."""
        ends = (rows for (_, end), rows in self.tables.ranking.items() if end == "proponent")
        return Counter(row.row for rows in ends for row in rows[:first])

    def components(self, query: int | str, example_id: str) -> list[ComponentScore]:
        """Split the score of a listed example over the model's components: the parts add up to it.

        Raises:
            UserError: the method has no components, or the pair is not among the listed ones.
        """
        without = f"The method `{self.run.method}` does not split scores by component."
        return self._pair("components", query, example_id, without)

    def tokens(self, query: int | str, example_id: str) -> list[TokenScore]:
        """Split the score of a listed example over its tokens: the parts add up to it; in order of position.

        A token's score is the effect of learning to predict that token, not of reading it. Tokens that are
        not predicted in training (a prompt's) score zero and are left out.

        Raises:
            UserError: no token scores were requested, or the pair is not among the listed ones.
        """
        return sorted(self._pair("tokens", query, example_id, "Run `vestige attribute` again with --tokens."))

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

    @property
    def has_dense(self) -> bool:
        """True if the run has the scores of all examples, and not only the ends of each ranking."""
        return (self.folder / DENSE_FILE).is_file()

    def dense_of(self, query: int | str) -> Float[np.ndarray, "example"]:
        """Return all scores of one query, float32, in the order of the training data; NaN for examples left out.

        Raises:
            UserError: The run keeps only the ends of each ranking.
            CorruptFile: The file is damaged.
        """
        at = self.queries.index(self.query_id(query))
        return open_dense(self.folder).read(queries=slice(at, at + 1))[0]

    def to_rows(self) -> list[dict[str, Any]]:
        """Return a dictionary for each listed row of each query, proponents before opponents."""
        names = ("rank", "example_id", "score", "percentile", "text", "source", "row")
        return [
            {"query_id": query, "end": end, **{name: getattr(row, name) for name in names}}
            for query in self.queries
            for end, rows in self.ends(query).items()
            for row in rows
        ]

    def to_pandas(self, *, dense: bool = False) -> "pandas.DataFrame":
        """Return the run as a pandas data frame.

        Args:
            dense: All scores, a row for each training example and a column for each query. Not given: both ends of
                every ranking with their texts, a row for each listed score.

        Raises:
            MissingExtra: pandas is not installed.
            UserError: `dense`, and the run keeps only the ends of each ranking.
        """
        try:
            import pandas
        except ImportError as error:
            raise MissingExtra("Data frames need pandas.\nType: pip install pandas") from error
        if dense:
            index = pandas.Index(self.tables.dense_ids, name="example_id")
            return pandas.DataFrame(self.dense().T, index=index, columns=pandas.Index(self.queries, name="query_id"))
        return pandas.DataFrame(self.to_rows(), columns=[*SCHEMAS["scores"].names, "text", "source"])

    def compare(self, other: "Scores", query: int | str = 0, k: int = 10) -> Comparison:
        """Compare the ranking of a query with that of another run: two methods, checkpoints or settings.

        Args:
            other: A run of the same data and question; its model and its answer may be others.
            query: Position or id of the query in this run; the other has it under the same id.
            k: First proponents of both that are compared.

        Returns:
            A table of the first `k` of both with their two ranks; how many are shared, as `shared`; and Spearman's
            correlation over all examples as `correlation`, None unless both runs have all scores.

        Raises:
            UserError: The runs are of different data, or of different questions.
        """
        return compare(self, other, query, k)

    def plot(self, query: int | str = 0) -> "Figure":
        """Return a figure of a query: its strongest proponents and opponents, and where they stand among all scores.

        It belongs to no window: a notebook shows it, `savefig` writes it.

        Args:
            query: Position or id of the query.
        """
        return runs.draw_ranking(self, self.query_id(query))

    def __repr__(self) -> str:
        words = (excerpt(query.wording.shown, 90) for query in islice(self.tables.queries.values(), _SHOWN))
        lines = [self._title, *(f"  {number}: {shown}" for number, shown in enumerate(words))]
        more = (self._more, self.meaning.sign, self.run.describe_missing())
        return "\n".join(line for line in (*lines, *more) if line)

    def _repr_html_(self) -> str:
        rows = [
            (shorten(name), excerpt(query.wording.shown, TITLE_WIDTH), runs.conclude(self, name).sentences[0])
            for name, query in islice(self.tables.queries.items(), _SHOWN)
        ]
        caption = " ".join(part for part in (self._title, self._more, self.run.describe_missing()) if part)
        return render_html(caption, ("query", "question and answer", "conclusion"), rows)

    @property
    def _more(self) -> str:
        return f"  … and {len(self.queries) - _SHOWN} more" if len(self.queries) > _SHOWN else ""

    @property
    def _title(self) -> str:
        run = self.run
        return f"Scores of {len(self.queries)} queries against {run.data.examples} examples by {run.method}"

    def query_id(self, query: int | str) -> str:
        """Return the id of a query that is given by its position or its id.

        Raises:
            UserError: There is no such query.
        """
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

    def _pair(self, name: PartTable, query: int | str, example_id: str, without: str) -> list[Any]:
        """Return the parts of one listed example."""
        pairs = self.tables.parts(name)
        if pairs is None:
            raise UserError(f"{self.folder} holds no {name[:-1]} scores. {self.run.describe_missing() or without}")
        query = self.query_id(query)
        if (query, example_id) in pairs:
            return pairs[query, example_id]
        same = sum(each.id == example_id for each in self.tables.examples.values())
        if same > 1:
            raise UserError(
                f"{same} listed examples have the id {example_id!r}, so their {name} cannot be distinguished.\n"
                "Give every example an id of its own, and attribute again."
            )
        raise UserError(
            f"Example {example_id!r} is not among the listed examples of query {query!r}.\n"
            "Give an example_id from `scores.top(query)` or `scores.bottom(query)`."
        )

    def _self_influence(self, columns: Sequence[str] | None = None) -> pa.Table:
        if not self.tables.has(SELF_TABLE):
            advice = self.run.describe_missing() or "Run `vestige attribute` again with --self-influence."
            raise UserError(f"{self.folder} holds no self-influence.\n{advice}")
        return self.tables.read(SELF_TABLE, columns)
