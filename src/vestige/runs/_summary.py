"""The summary of a stream of scores: both ends, moments, a histogram, groups, all scores if requested."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from scipy.special import stdtrit

from vestige.errors import VestigeError
from vestige.files import open_temporary
from vestige.runs._record import DistributionRecord, GroupRecord
from vestige.runs._sample import hash_of, hashed
from vestige.runs._topk import RankedScore, TopK, block_arrays
from vestige.runs._types import ScoreBlock

KEPT_BYTES = 64 * 2**20
"""Scores kept for histograms; beyond it a fixed sample of rows stands for all."""

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
    """Collects the score blocks of a method, in any order, and sums them up.

    Memory: a bit for each example, 4 bytes if there are sources, and at most 64 MB for histograms; 40 bytes while they
    are summed up. On the disk for temporary files: `4 bytes x queries x examples` with `dense`. Ends, percentiles,
    moments and groups are exact. The histogram is exact as long as all scores fit into those 64 MB; beyond, it counts
    the rows whose hashed number is smallest, the same in every run.

    Rows in `skipped` count nowhere, whatever the blocks hold for them; `dense` holds NaN there.
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
        self._queries = queries
        fitting = min(examples, max(1, kept_bytes // (4 * max(queries, 1))))
        self._dense = _map_scores(queries, examples) if dense else None
        self._largest_hash = hash_of(examples, fitting)
        self._kept = np.zeros((queries, 0 if dense else fitting), np.float32)
        self._sampled = 0
        self._left_out = np.unique(np.array(skipped, dtype=np.int64))
        self._seen = _Rows(examples)
        self._seen.add(self._left_out)
        self._top = TopK(queries, k)
        self._moments = _Moments(queries)
        self._groups = _Groups(queries, examples, sources)

    def add(self, block: ScoreBlock) -> None:
        """Add one block.

        Raises:
            NonFinite: a score is NaN or infinite.
            VestigeError: a row was scored before.
        """
        rows, scores = block_arrays(self._without_left_out(block))
        if scores.shape != (self._queries, len(rows)):
            raise VestigeError(f"A score block of shape {scores.shape} for {self._queries} queries x {len(rows)} rows.")
        if (again := self._seen.among(rows)).any():
            raise VestigeError(f"The method scored training row {rows[again][0]} twice.")
        self._seen.add(rows)
        self._keep(rows, scores)
        self._top.add(rows, scores)
        self._moments.add(scores)
        self._groups.add(rows, scores)

    def _without_left_out(self, block: ScoreBlock) -> ScoreBlock:
        wanted = ~np.isin(block.rows.cpu().numpy(), self._left_out)
        if wanted.all():
            return block
        places = np.flatnonzero(wanted).tolist()
        return ScoreBlock(block.rows[places], block.scores[:, places])

    def _keep(self, rows: Int[np.ndarray, "row"], scores: Float[np.ndarray, "query row"]) -> None:
        """Put scores aside for the histogram, in order of arrival, or all of them in order of the rows."""
        if self._dense is not None:
            self._dense[:, rows] = scores
            self._sampled += len(rows)
            return
        kept = hashed(rows) <= self._largest_hash
        begin, self._sampled = self._sampled, self._sampled + int(np.count_nonzero(kept))
        self._kept[:, begin : self._sampled] = scores[:, kept]

    def finish(self) -> ScoreSummary:
        """Return the summary, once every training row has been scored.

        Raises:
            VestigeError: a row was left out.
        """
        if (missing := self._seen.others()).size:
            raise VestigeError(f"The method scored no training row {missing[0]} ({len(missing)} rows are missing).")
        if (dense := self._dense) is not None:
            dense[:, self._left_out] = np.nan
        kept = self._kept[:, : self._sampled] if dense is None else dense
        return ScoreSummary(
            ranked=self._top.ranked(),
            distribution=[self._distribution(query, kept[query]) for query in range(self._queries)],
            groups=[self._groups.records(query) for query in range(self._queries)],
            dense=dense,
        )

    def _distribution(self, query: int, kept: Float[np.ndarray, "kept"]) -> DistributionRecord:
        moments = self._moments
        low, high = float(moments.low[query]), float(moments.high[query])
        # Scores given in float64 are kept in float32: rounding must not push the extremes out.
        counts, edges = np.histogram(np.clip(_known(kept), low, high), bins=BINS, range=(low, high))
        return DistributionRecord(
            count=moments.count,
            mean=float(moments.mean[query]),
            std=float(np.sqrt(moments.squares[query] / max(moments.count, 1))),
            min=low,
            max=high,
            edges=edges.tolist(),
            counts=counts.tolist(),
            sampled=self._sampled,
            cumulative_share=self._shares(query, kept),
        )

    def _shares(self, query: int, kept: Float[np.ndarray, "kept"]) -> list[tuple[int, float]]:
        total = float(self._moments.positive[query])
        if total <= 0:
            return []
        # From a sample only the ends that were kept exactly give what the highest k hold.
        complete = self._sampled == self._moments.count
        highest = np.sort(_known(kept))[: -SHARES_AT[-1] - 1 : -1] if complete else self._top.scores(query, "proponent")
        held = np.cumsum(np.maximum(highest, 0))
        return [(k, min(1.0, float(held[k - 1]) / total)) for k in SHARES_AT if k <= len(held)]


def _map_scores(queries: int, examples: int) -> Float[np.ndarray, "query example"]:
    """Return an array in a file without a name: it may be larger than the memory."""
    if not queries * examples:
        return np.zeros((queries, examples), dtype=np.float32)
    with open_temporary(4 * queries * examples) as file:
        return np.asarray(np.memmap(file, dtype=np.float32, mode="r+", shape=(queries, examples)))


def _known(kept: Float[np.ndarray, "kept"]) -> Float[np.ndarray, "part"]:
    """Return the scores of a query in float64, without those of rows that were left out."""
    values = kept.astype(np.float64)
    return values[~np.isnan(values)]


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


class _Rows:
    """A set of row numbers: one bit for each that there may be."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._bits = np.zeros(-(-count // 8), dtype=np.uint8)

    def add(self, rows: Int[np.ndarray, "row"]) -> None:
        np.bitwise_or.at(self._bits, rows // 8, _bit(rows))

    def among(self, rows: Int[np.ndarray, "row"]) -> Bool[np.ndarray, "row"]:
        """Return which of `rows` are in the set."""
        return (self._bits[rows // 8] & _bit(rows)) > 0

    def others(self) -> Int[np.ndarray, "other"]:
        """Return those that are not in the set, ascending."""
        if np.bitwise_count(self._bits).sum() == self._count:
            return np.arange(0)
        return np.flatnonzero(np.unpackbits(self._bits, count=self._count, bitorder="little") == 0)


def _bit(rows: Int[np.ndarray, "row"]) -> UInt8[np.ndarray, "row"]:
    return np.left_shift(1, rows % 8).astype(np.uint8)


class _Groups:
    """Sum and spread of the scores of each source."""

    def __init__(self, queries: int, examples: int, sources: Iterable[str | None] | None) -> None:
        met: dict[str, int] = {}
        numbers = (met.setdefault(source or NO_SOURCE, len(met)) for source in sources or ())
        self._group = np.fromiter(numbers, np.int32, examples if sources is not None else 0)
        self._names = list(met) if met.keys() - {NO_SOURCE} else []
        self._sizes = np.zeros(len(self._names), dtype=np.int64)
        self._sum = np.zeros((queries, len(self._names)))
        self._squares = np.zeros((queries, len(self._names)))

    def add(self, rows: Int[np.ndarray, "row"], scores: Float[np.ndarray, "query row"]) -> None:
        if not self._names or len(rows) == 0:
            return
        group = self._group[rows]
        order = np.argsort(group, kind="stable")
        present, starts, sizes = np.unique(group[order], return_index=True, return_counts=True)
        values = scores[:, order].astype(np.float64)
        self._sizes[present] += sizes
        self._sum[:, present] += np.add.reduceat(values, starts, axis=1)
        self._squares[:, present] += np.add.reduceat(values**2, starts, axis=1)

    def records(self, query: int) -> list[GroupRecord]:
        records = [
            _group_record(name, int(size), float(total), float(squares))
            for name, size, total, squares in zip(
                self._names, self._sizes, self._sum[query], self._squares[query], strict=True
            )
            if size
        ]
        return sorted(records, key=lambda record: (-record.sum, record.source))


def _group_record(source: str, size: int, total: float, squares: float) -> GroupRecord:
    """Return Student's 95% interval of the mean; too narrow when a few examples hold most of the sum."""
    mean = total / size
    if size == 1:
        return GroupRecord(source=source, examples=1, sum=total, mean=mean, low=None, high=None)
    variance = max(squares - size * mean**2, 0.0) / (size - 1)
    half = float(stdtrit(size - 1, 0.975)) * (variance / size) ** 0.5
    return GroupRecord(source=source, examples=size, sum=total, mean=mean, low=mean - half, high=mean + half)
