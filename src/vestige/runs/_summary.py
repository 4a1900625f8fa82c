"""The summary of a stream of scores: both ends, moments, a histogram, groups, all scores if requested."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt64

from vestige.errors import NonFinite, VestigeError
from vestige.runs._groups import NO_SOURCE as NO_SOURCE, Groups
from vestige.runs._record import DistributionRecord, GroupRecord
from vestige.storage import open_temporary

# Only named in annotations, so that a run opens without importing torch.
if TYPE_CHECKING:
    from torch import Tensor

KEPT_BYTES = 64 * 2**20
"""Scores kept for histograms; beyond it a fixed sample of rows stands for all."""
BINS = 60
SHARES_AT = (1, 3, 10, 30, 100, 300, 1000, 3000, 10000)


class ScoreBlock(NamedTuple):
    """Scores of a few training examples for every query: tensors, or the arrays of a method that needs no torch."""

    rows: "Int[Tensor, 'row']"
    """Positions of the examples in the training data."""
    scores: "Float[Tensor, 'query row']"

    def arrays(self) -> tuple[Int[np.ndarray, "row"], Float[np.ndarray, "query row"]]:
        """Return rows (int64) and scores (float32, or float64 if given so) on the CPU."""
        return _as_array(self.rows).astype(np.int64), _as_array(self.scores)


def sample_rows(examples: int, wanted: int) -> Int[np.ndarray, "kept"]:
    """Return `wanted` row numbers, ascending: those with the smallest hash, the same in every run."""
    return np.flatnonzero(_hash(np.arange(examples)) <= _largest_hash(examples, min(wanted, examples)))


def _largest_hash(examples: int, wanted: int) -> int:
    """Return the hash that `wanted` of the examples do not exceed."""
    if wanted == examples:
        return 2**64 - 1
    return int(np.partition(_hash(np.arange(examples)), wanted - 1)[wanted - 1])


def _hash(rows: Int[np.ndarray, "row"]) -> UInt64[np.ndarray, "row"]:
    """Hash by splitmix64's finaliser, which is one to one: neighbouring row numbers land far apart."""
    code = (rows.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    code = (code ^ (code >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    code = (code ^ (code >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return code ^ (code >> np.uint64(31))


End = Literal["proponent", "opponent"]
_SIGNS: dict[End, int] = {"proponent": 1, "opponent": -1}
"""What scores are multiplied with, so that the best of an end are the highest."""


class RankedScore(NamedTuple):
    """One line of `scores.parquet`, before ids are filled in."""

    query: int
    """Position of the query."""
    end: End
    rank: int
    """1-based, within its end."""
    row: int
    """Position of the example in the training data."""
    score: float
    percentile: float | None
    """Share of all training examples with a smaller score, in percent; None where only some have one."""


def _as_array(values: "Tensor | np.ndarray") -> np.ndarray:
    """Return numbers on the CPU, floats of two bytes as float32: NumPy has no bfloat16."""
    if isinstance(values, np.ndarray):
        return values
    values = values.detach().cpu()
    return (values.float() if values.is_floating_point() and values.dtype.itemsize < 4 else values).numpy()


def _require_finite(rows: Int[np.ndarray, "row"], scores: Float[np.ndarray, "query row"]) -> None:
    if not np.isfinite(scores).all():
        query, column = np.argwhere(~np.isfinite(scores))[0]
        raise NonFinite(
            f"The score of training row {rows[column]} for query {query} is {scores[query, column]}.\n"
            "A loss or an activation overflowed: run again with --precision float32, or leave that row out, by hand or "
            "with --skip-bad, of vestige index where there is one."
        )


class TopK:
    """The `k` highest and `k` lowest scores of each query; equal scores are ordered by row number.

    The result does not depend on the order of the blocks or of the rows in them. With fewer than `2 k`
    training examples some are listed at both ends, since an end is a part of the ranking and no verdict.
    """

    def __init__(self, queries: int, k: int) -> None:
        self._seen = 0
        self._kept = {end: [_Highest(k) for _ in range(queries)] for end in _SIGNS}

    def add(self, rows: Int[np.ndarray, "row"], scores: Float[np.ndarray, "query row"]) -> None:
        """Add the scores of `rows`; every row may be given once."""
        self._seen += len(rows)
        for end, sign in _SIGNS.items():
            for kept, values in zip(self._kept[end], scores, strict=True):
                kept.add(rows, sign * values)

    def rows(self, query: int, end: End) -> Int[np.ndarray, "rank"]:
        """Return the rows of one end, best first."""
        return self._kept[end][query].rows

    def scores(self, query: int, end: End) -> Float[np.ndarray, "rank"]:
        """Return the scores of one end in float64, best first."""
        return _SIGNS[end] * self._kept[end][query].keys

    def rank(self) -> list[RankedScore]:
        """Return both ends of every query, with exact percentiles."""
        return [
            RankedScore(query, end, rank, int(row), float(score), float(percentile))
            for query in range(len(self._kept["proponent"]))
            for end in _SIGNS
            for rank, (row, score, percentile) in enumerate(
                zip(self.rows(query, end), self.scores(query, end), self._percentiles(query, end), strict=True), 1
            )
        ]

    def _percentiles(self, query: int, end: End) -> Float[np.ndarray, "rank"]:
        # Exact although only 2 k scores are kept: whatever is larger than a kept high score (smaller than a
        # kept low one) is kept too, and ties with the last kept one are counted as they stream by.
        kept = self._kept[end][query]
        smaller = self._seen - kept.count_at_least() if end == "proponent" else kept.count_above()
        return 100.0 * smaller / max(self._seen, 1)


class _Highest:
    """The `k` highest keys of one stream, best first, and how many equal the last of them."""

    def __init__(self, k: int) -> None:
        self._k = k
        self.rows = np.empty(0, dtype=np.int64)
        self.keys = np.empty(0, dtype=np.float64)
        self._ties = 0

    def add(self, rows: Int[np.ndarray, "row"], keys: Float[np.ndarray, "row"]) -> None:
        full = len(self.keys) == self._k
        if full:
            eligible = keys >= self.keys[-1]
            if not eligible.any():
                return
            rows, keys = rows[eligible], keys[eligible]
        if len(keys) > self._k:
            # All ties with the k-th stay, since the row decides.
            highest = keys >= np.partition(keys, -self._k)[-self._k]
            rows, keys = rows[highest], keys[highest]
        all_rows, all_keys = np.concatenate([self.rows, rows]), np.concatenate([self.keys, keys])
        order = np.lexsort((all_rows, -all_keys))[: self._k]
        last = all_keys[order[-1]] if len(order) else 0.0
        unmoved = full and last == self.keys[-1]
        already = self._ties if unmoved else int((self.keys == last).sum())
        self._ties = already + int((keys == last).sum())
        self.rows, self.keys = all_rows[order], all_keys[order]

    def count_at_least(self) -> Int[np.ndarray, "rank"]:
        """Return, for each kept key, how many keys of the whole stream are at least as high."""
        counts = np.searchsorted(-self.keys, -self.keys, side="right")
        if len(self.keys):
            last = self.keys == self.keys[-1]
            counts[last] = self.count_above()[last] + self._ties
        return counts

    def count_above(self) -> Int[np.ndarray, "rank"]:
        """Return, for each kept key, how many keys of the whole stream are higher."""
        return np.searchsorted(-self.keys, -self.keys, side="left")


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

    Memory: five bytes for each example, and at most 64 MB for histograms; with `dense`, also `4 bytes x queries x
    examples` on the disk for temporary files. Ends, percentiles, moments and groups are exact. The histogram is exact
    as long as all scores fit into those 64 MB; beyond, it counts the rows whose hashed number is smallest, the same in
    every run.

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
        self._largest_hash = _largest_hash(examples, fitting)
        self._kept = np.zeros((queries, 0 if dense else fitting), np.float32)
        self._sampled = 0
        self._left_out = np.array(skipped, dtype=np.int64)
        self._scored = np.zeros(examples, dtype=bool)
        self._scored[self._left_out] = True
        self._top = TopK(queries, k)
        self._moments = _Moments(queries)
        self._groups = Groups(queries, sources)

    def add(self, block: ScoreBlock) -> None:
        """Add one block.

        Raises:
            NonFinite: a score is NaN or infinite.
            VestigeError: a row was scored before.
        """
        rows, scores = block.arrays()
        wanted = ~np.isin(rows, self._left_out)
        if not wanted.all():
            rows, scores = rows[wanted], scores[:, wanted]
        _require_finite(rows, scores)
        if scores.shape != (self._queries, len(rows)):
            raise VestigeError(f"A score block of shape {scores.shape} for {self._queries} queries x {len(rows)} rows.")
        if (again := self._scored[rows]).any():
            raise VestigeError(f"The method scored training row {rows[again][0]} twice.")
        self._scored[rows] = True
        self._keep(rows, scores)
        self._top.add(rows, scores)
        self._moments.add(scores)
        self._groups.add(rows, scores)

    def _keep(self, rows: Int[np.ndarray, "row"], scores: Float[np.ndarray, "query row"]) -> None:
        """Put scores aside for the histogram, in order of arrival, or all of them in order of the rows."""
        kept = np.full(len(rows), True) if self._dense is not None else _hash(rows) <= self._largest_hash
        begin, self._sampled = self._sampled, self._sampled + int(np.count_nonzero(kept))
        if self._dense is not None:
            self._dense[:, rows] = scores
        else:
            self._kept[:, begin : self._sampled] = scores[:, kept]

    def finish(self) -> ScoreSummary:
        """Return the summary, once every training row has been scored.

        Raises:
            VestigeError: a row was left out.
        """
        if (missing := np.flatnonzero(~self._scored)).size:
            raise VestigeError(f"The method scored no training row {missing[0]} ({len(missing)} rows are missing).")
        if (dense := self._dense) is not None:
            dense[:, self._left_out] = np.nan
        kept = self._kept[:, : self._sampled] if dense is None else dense
        return ScoreSummary(
            ranked=self._top.rank(),
            distribution=[self._distribution(query, kept[query]) for query in range(self._queries)],
            groups=[self._groups.records(query) for query in range(self._queries)],
            dense=dense,
        )

    def _distribution(self, query: int, kept: Float[np.ndarray, "kept"]) -> DistributionRecord:
        moments = self._moments
        low, high = float(moments.low[query]), float(moments.high[query])
        values = kept.astype(np.float64)
        values = values[~np.isnan(values)]
        # Scores given in float64 are kept in float32: rounding must not push the extremes out.
        counts, edges = np.histogram(np.clip(values, low, high), bins=BINS, range=(low, high))
        return DistributionRecord(
            count=moments.count,
            mean=float(moments.mean[query]),
            std=float(np.sqrt(moments.squares[query] / max(moments.count, 1))),
            min=low,
            max=high,
            edges=edges.tolist(),
            counts=counts.tolist(),
            sampled=self._sampled,
            cumulative_share=self._shares(query, values),
        )

    def _shares(self, query: int, values: Float[np.ndarray, "kept"]) -> list[tuple[int, float]]:
        total = float(self._moments.positive[query])
        if total <= 0:
            return []
        # From a sample only the ends that were kept exactly give what the highest k hold.
        complete = self._sampled == self._moments.count
        highest = np.sort(values)[::-1][: SHARES_AT[-1]] if complete else self._top.scores(query, "proponent")
        held = np.cumsum(np.maximum(highest, 0))
        return [(k, min(1.0, float(held[k - 1]) / total)) for k in SHARES_AT if k <= len(held)]


def _map_scores(queries: int, examples: int) -> Float[np.ndarray, "query example"]:
    """Return an array in a file without a name: it may be larger than the memory."""
    if not queries * examples:
        return np.zeros((queries, examples), dtype=np.float32)
    with open_temporary(4 * queries * examples) as file:
        return np.asarray(np.memmap(file, dtype=np.float32, mode="r+", shape=(queries, examples)))


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
