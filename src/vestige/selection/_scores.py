"""The scores of a run as selection needs them: a few numbers per example, never all pairs at once."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, final

import numpy as np
from jaxtyping import Float, Int

from vestige.errors import CorruptFile, UserError
from vestige.runs import DenseFile, Scores, open_dense, read_run_table

_BLOCK_BYTES = 64 * 2**20
_DENSE = "scores.safetensors"


class Best(NamedTuple):
    """For each example, the target that it serves best."""

    score: Float[np.ndarray, "example"]
    """NaN where the run has none."""
    target: Int[np.ndarray, "example"]


class Ranked(NamedTuple):
    """The head of one query's ranking, best first."""

    rows: Int[np.ndarray, "rank"]
    scores: Float[np.ndarray, "rank"]


class ScoreSource(ABC):
    """Scores of every example, or of those at the ends of the rankings."""

    def __init__(self, run: Scores) -> None:
        self.run = run

    @property
    def queries(self) -> list[str]:
        """Ids, in order."""
        return self.run.queries

    @property
    def examples(self) -> int:
        """The number of examples that the run scored."""
        return self.run.run.data.examples

    @property
    @abstractmethod
    def reliable(self) -> int:
        """The number of the best of each ranking that are known."""

    @property
    def complete(self) -> bool:
        """True if every example that was scored is known."""
        return self.reliable >= self.examples - len(self.run.run.left_out)

    @abstractmethod
    def known_ids(self) -> dict[int, str]:
        """Return the ids of the examples whose rows the run names."""

    @abstractmethod
    def best(self, groups: Sequence[Sequence[int]]) -> Best:
        """Return the highest of the mean scores over each group of queries; the earlier group where two are equal.

        Only the `reliable` highest are certain to be the highest. Scores of examples for which one is not finite, or
        not known, are NaN.

        Raises:
            UserError: The run does not hold what this would need.
        """

    def means(self) -> Float[np.ndarray, "example"]:
        """Return the mean score of every example over all queries, float64; NaN where one of them is not finite.

        Raises:
            UserError: The run does not hold them.
        """
        if not self.complete:
            raise self.needs_all("This strategy")
        return self.best([range(len(self.queries))]).score

    @abstractmethod
    def ranking(self, query: int, count: int, ties: Float[np.ndarray, "example"]) -> Ranked:
        """Return the `count` best of a query, equal scores in ascending order of `ties`; fewer if no more are known."""

    def needs_all(self, what: str) -> UserError:
        """Return the error of a run that keeps too little."""
        return UserError(
            f"{what} needs more scores than {self.run.folder} keeps: the {self.reliable} best of each query.\n"
            "Run `vestige attribute` again with --dense, or with a larger --k."
        )


@final
class DenseScores(ScoreSource):
    """A run with all scores, read a block of examples or one query at a time."""

    @property
    def reliable(self) -> int:
        """All."""
        return self.examples

    def known_ids(self) -> dict[int, str]:
        """Return the ids of all examples."""
        return dict(enumerate(self._file.example_ids()))

    def best(self, groups: Sequence[Sequence[int]]) -> Best:
        """Compute the best means a block of examples at a time."""
        score, target = np.full(self.examples, np.nan), np.zeros(self.examples, dtype=np.int64)
        for rows, block in self._blocks():
            score[rows], target[rows] = best_of(block, groups)
        return Best(score, target)

    def ranking(self, query: int, count: int, ties: Float[np.ndarray, "example"]) -> Ranked:
        """Rank one query's row of the file."""
        scores = self._file.read(queries=slice(query, query + 1))[0].astype(np.float64)
        scores[~np.isfinite(scores)] = np.nan
        return head(scores, count, ties)

    def _blocks(self) -> Iterator[tuple[slice, Float[np.ndarray, "query row"]]]:
        step = max(1, _BLOCK_BYTES // (8 * max(len(self.queries), 1)))
        for start in range(0, self.examples, step):
            rows = slice(start, min(start + step, self.examples))
            yield rows, self._file.read(examples=rows)

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
class ListedScores(ScoreSource):
    """A run that keeps only the ends of each ranking: enough where a query's best are all that is requested."""

    @property
    def reliable(self) -> int:
        """The shortest list of proponents."""
        return min((len(ranked.rows) for ranked in self._lists), default=0)

    def known_ids(self) -> dict[int, str]:
        """Return the ids of the listed examples."""
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
            return best_of(scores, groups)
        if any(len(group) > 1 for group in groups):
            raise self.needs_all("A mean over queries")
        score, target = np.full(self.examples, np.nan), np.zeros(self.examples, dtype=np.int64)
        for number, (query,) in enumerate(groups):
            rows, values = self._lists[query]
            better = np.isnan(score[rows]) | (values > score[rows])
            score[rows[better]], target[rows[better]] = values[better], number
        return Best(score, target)

    def ranking(self, query: int, count: int, ties: Float[np.ndarray, "example"]) -> Ranked:
        """Return the head of the list."""
        rows, values = self._lists[query]
        order = np.lexsort((ties[rows], -values))[:count]
        return Ranked(rows[order], values[order])

    @cached_property
    def _lists(self) -> list[Ranked]:
        table = read_run_table(self.run.folder, "scores", ["query_id", "end", "row", "score"])
        place = {name: number for number, name in enumerate(self.queries)}
        asked = np.array([place.get(name, -1) for name in table["query_id"].to_pylist()], dtype=np.int64)
        lines = table["row"].to_numpy()
        if len(lines) and (asked.min() < 0 or lines.min() < 0 or lines.max() >= self.examples):
            raise CorruptFile(
                f"{self.run.folder / 'scores.parquet'} names queries or rows that the run does not have. "
                "Run `vestige attribute` again."
            )
        top = np.array([end == "proponent" for end in table["end"].to_pylist()], dtype=bool)
        rows, scores = table["row"].to_numpy(), table["score"].to_numpy()
        own = [top & (asked == number) for number in range(len(self.queries))]
        return [Ranked(rows[mask], scores[mask]) for mask in own]


def open_scores(folder: Path) -> ScoreSource:
    """Open the scores of a run.

    Raises:
        UserError: There is no run.
    """
    run = Scores.open(folder)
    return DenseScores(run) if (run.folder / _DENSE).is_file() else ListedScores(run)


def head(scores: Float[np.ndarray, "example"], count: int, ties: Float[np.ndarray, "example"]) -> Ranked:
    """Return the `count` highest of the scores that are numbers, equal ones in ascending order of `ties`."""
    rows = np.flatnonzero(~np.isnan(scores))
    if count < len(rows):
        # All ties with the last one stay in the race: their order decides, not their position.
        least = np.partition(scores[rows], -count)[-count]
        rows = rows[scores[rows] >= least]
    order = rows[np.lexsort((ties[rows], -scores[rows]))][:count]
    return Ranked(order, scores[order])


def best_of(scores: Float[np.ndarray, "query row"], groups: Sequence[Sequence[int]]) -> Best:
    """Return for each row the highest mean over a group of queries, added up in float64, and the first such group."""
    means = np.stack([scores[list(group)].mean(0, dtype=np.float64) for group in groups])
    usable = np.isfinite(means).all(0)
    means = np.where(usable, means, 0.0)
    return Best(np.where(usable, means.max(0), np.nan), means.argmax(0))
