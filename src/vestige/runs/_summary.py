"""What is remembered of a stream of scores: both ends, moments, a histogram, groups, all if asked."""

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt64
from scipy.special import stdtrit

from vestige.errors import VestigeError
from vestige.runs._record import DistributionRecord, GroupRecord
from vestige.runs._topk import RankedScore, TopK, block_arrays
from vestige.runs._types import ScoreBlock

KEPT_BYTES = 64 * 2**20
"""Scores kept in memory for histograms; beyond it a fixed sample of rows stands for all."""

_COUNTED = 2**16
"""Scores of a query that are counted at once."""
_HASHED = 2**16
"""Rows that are hashed, and examples whose sources are read, at once."""
BINS = 60
SHARES_AT = (1, 3, 10, 30, 100, 300, 1000, 3000, 10000)
NO_SOURCE = "(no source)"


class ScoreSummary(NamedTuple):
    """Everything that a run keeps of its scores."""

    ranked: list[RankedScore]
    distribution: list[DistributionRecord]
    """One per query."""
    groups: list[list[GroupRecord]]
    """For each query one per source, largest sum first; empty where no example has a source."""
    dense: Float[np.ndarray, "query example"] | None


class ScoreCollector:
    """Takes in the score blocks of a method, in any order, and sums them up.

    Memory: at most 64 MB for histograms, whatever the size of the data, and `4 bytes x queries x examples` with
    `dense`. Ends, percentiles, moments and groups are exact. The histogram is exact as long as all scores fit into
    those 64 MB; beyond, it counts the rows whose hashed number is smallest, the same in every run.

    Rows in `skipped` count nowhere, whatever the blocks say of them; `dense` holds NaN there.
    """

    def __init__(
        self,
        queries: int,
        examples: int,
        *,
        k: int = 50,
        sources: Iterable[str | None] | None = None,
        dense: bool = False,
        kept_bytes: int = KEPT_BYTES,
        skipped: Sequence[int] = (),
    ) -> None:
        self._queries, self._examples, self._dense = queries, examples, dense
        fitting = examples if dense else max(1, kept_bytes // (4 * max(queries, 1)))
        self._kept_rows = sampled_rows(examples, fitting).astype(np.min_scalar_type(examples))
        self._kept = np.zeros((queries, len(self._kept_rows)), dtype=np.float32)
        self._left_out = np.zeros(examples, dtype=bool)
        self._left_out[list(skipped)] = True
        self._counted = ~self._left_out[self._kept_rows]
        self._kept[:, ~self._counted] = np.nan
        self._seen = self._left_out.copy()
        self._top = TopK(queries, k)
        self._moments = _Moments(queries)
        self._groups = _Groups(queries, sources, self._left_out)

    def add(self, block: ScoreBlock) -> None:
        """Takes in one block.

        Raises:
            NonFinite: a score is NaN or infinite.
            VestigeError: a row was scored before.
        """
        rows, scores = block_arrays(self._without_left_out(block))
        if scores.shape != (self._queries, len(rows)):
            raise VestigeError(f"A score block of shape {scores.shape} for {self._queries} queries x {len(rows)} rows.")
        if self._seen[rows].any():
            raise VestigeError(f"The method scored training row {rows[self._seen[rows]][0]} twice.")
        self._seen[rows] = True
        slots = np.searchsorted(self._kept_rows, rows)
        kept = self._kept_rows[np.minimum(slots, len(self._kept_rows) - 1)] == rows
        self._kept[:, slots[kept]] = scores[:, kept]
        self._top.add(rows, scores)
        self._moments.add(scores)
        self._groups.add(rows, scores)

    def _without_left_out(self, block: ScoreBlock) -> ScoreBlock:
        wanted = ~self._left_out[block.rows.cpu().numpy()]
        if wanted.all():
            return block
        places = np.flatnonzero(wanted).tolist()
        return ScoreBlock(block.rows[places], block.scores[:, places])

    def finish(self) -> ScoreSummary:
        """The summary, once every training row has been scored.

        Raises:
            VestigeError: a row was left out.
        """
        if not self._seen.all():
            missing = np.flatnonzero(~self._seen)
            raise VestigeError(f"The method scored no training row {missing[0]} ({len(missing)} rows are missing).")
        return ScoreSummary(
            ranked=self._top.ranked(),
            distribution=[self._distribution(query) for query in range(self._queries)],
            groups=[self._groups.records(query) for query in range(self._queries)],
            dense=self._kept if self._dense else None,
        )

    def _distribution(self, query: int) -> DistributionRecord:
        moments, kept = self._moments, self._kept[query, self._counted]
        low, high = float(moments.low[query]), float(moments.high[query])
        counts, edges = np.histogram([], bins=BINS, range=(low, high))
        for first in range(0, len(kept), _COUNTED):
            # Scores given in float64 are kept in float32: rounding must not push the extremes out.
            part = np.clip(kept[first : first + _COUNTED].astype(np.float64), low, high)
            counts += np.histogram(part, bins=BINS, range=(low, high))[0]
        return DistributionRecord(
            count=moments.count,
            mean=float(moments.mean[query]),
            std=float(np.sqrt(moments.squares[query] / max(moments.count, 1))),
            min=low,
            max=high,
            edges=edges.tolist(),
            counts=counts.tolist(),
            sampled=len(kept),
            cumulative_share=self._shares(query, kept),
        )

    def _shares(self, query: int, kept: Float[np.ndarray, "kept"]) -> list[tuple[int, float]]:
        total = float(self._moments.positive[query])
        if total <= 0:
            return []
        # From a sample only the ends that were kept exactly say what the highest k hold.
        complete = len(kept) == self._moments.count
        highest = _highest(kept) if complete else self._top.scores(query, "proponent")
        held = np.cumsum(np.maximum(highest, 0))
        return [(k, min(1.0, float(held[k - 1]) / total)) for k in SHARES_AT if k <= len(held)]


def _highest(scores: Float[np.ndarray, "kept"]) -> Float[np.ndarray, "rank"]:
    """As many of the highest scores as a share is asked of, best first, in float64."""
    wanted, found = SHARES_AT[-1], np.empty(0)
    for first in range(0, len(scores), _COUNTED):
        found = np.sort(np.concatenate([found, scores[first : first + _COUNTED].astype(np.float64)]))[-wanted:]
    return found[::-1]


def sampled_rows(examples: int, wanted: int) -> Int[np.ndarray, "kept"]:
    """`wanted` row numbers, ascending: those with the smallest hash, the same in every run."""
    if wanted >= examples:
        return np.arange(examples)
    kept = np.empty(0, dtype=np.int64)
    for first in range(0, examples, _HASHED):
        kept = np.concatenate([kept, np.arange(first, min(first + _HASHED, examples))])
        if len(kept) > wanted:
            kept = kept[np.argpartition(_hashed(kept), wanted - 1)[:wanted]]
    return np.sort(kept)


def _hashed(rows: Int[np.ndarray, "row"]) -> UInt64[np.ndarray, "row"]:
    """The finaliser of splitmix64, which is one to one: neighbouring row numbers land far apart."""
    code = (rows.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    code = (code ^ (code >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    code = (code ^ (code >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return code ^ (code >> np.uint64(31))


class _Moments:
    """Count, mean, sum of squared deviations, extremes and positive sum per query, in float64."""

    def __init__(self, queries: int) -> None:
        self.count = 0
        self.mean = np.zeros(queries)
        self.squares = np.zeros(queries)
        self.low = np.full(queries, np.inf)
        self.high = np.full(queries, -np.inf)
        self.positive = np.zeros(queries)

    def add(self, scores: Float[np.ndarray, "query row"]) -> None:
        new = scores.shape[1]
        if new == 0:
            return
        values = scores.astype(np.float64)
        mean = values.mean(axis=1)
        shift = mean - self.mean
        total = self.count + new
        # Chan, Golub and LeVeque (1983): adding up raw squares would cancel for scores far from zero.
        self.squares += ((values - mean[:, None]) ** 2).sum(axis=1) + shift**2 * self.count * new / total
        self.mean += shift * new / total
        self.count = total
        self.low = np.minimum(self.low, values.min(axis=1))
        self.high = np.maximum(self.high, values.max(axis=1))
        self.positive += np.maximum(values, 0).sum(axis=1)


class _Groups:
    """Sum and spread of the scores of each source."""

    def __init__(
        self, queries: int, sources: Iterable[str | None] | None, left_out: Bool[np.ndarray, "example"]
    ) -> None:
        met: dict[str | None, int] = {}
        numbers, parts = (met.setdefault(source or None, len(met)) for source in sources or ()), []
        while part := list(islice(numbers, _HASHED)):
            parts.append(_in_few_bytes(part))
        names = [name or NO_SOURCE for name in met] if met.keys() - {None} else list[str]()
        self._names = sorted(set(names))
        code = {name: number for number, name in enumerate(self._names)}
        self._group = _in_few_bytes([code[name] for name in names])[np.concatenate(parts)] if names else None
        self._sizes = np.bincount(self._group[~left_out], minlength=len(self._names)) if self._group is not None else []
        self._sum = np.zeros((queries, len(self._names)))
        self._squares = np.zeros((queries, len(self._names)))

    def add(self, rows: Int[np.ndarray, "row"], scores: Float[np.ndarray, "query row"]) -> None:
        if self._group is None or len(rows) == 0:
            return
        group = self._group[rows]
        order = np.argsort(group, kind="stable")
        present, starts = np.unique(group[order], return_index=True)
        values = scores[:, order].astype(np.float64)
        self._sum[:, present] += np.add.reduceat(values, starts, axis=1)
        self._squares[:, present] += np.add.reduceat(values**2, starts, axis=1)

    def records(self, query: int) -> list[GroupRecord]:
        records = [
            _group_record(str(name), int(size), float(total), float(squares))
            for name, size, total, squares in zip(
                self._names, self._sizes, self._sum[query], self._squares[query], strict=True
            )
            if size
        ]
        return sorted(records, key=lambda record: (-record.sum, record.source))


def _in_few_bytes(numbers: Sequence[int]) -> Int[np.ndarray, "number"]:
    """The numbers, none below zero, in one byte each if that is enough."""
    return np.array(numbers, dtype=np.min_scalar_type(max(numbers)))


def _group_record(source: str, size: int, total: float, squares: float) -> GroupRecord:
    """Student's 95% interval of the mean; too narrow when a few examples hold most of the sum."""
    mean = total / size
    if size == 1:
        return GroupRecord(source=source, examples=1, sum=total, mean=mean, low=None, high=None)
    variance = max(squares - size * mean**2, 0.0) / (size - 1)
    half = float(stdtrit(size - 1, 0.975)) * (variance / size) ** 0.5
    return GroupRecord(source=source, examples=size, sum=total, mean=mean, low=mean - half, high=mean + half)
