"""The two ends of every query's ranking, kept while score blocks stream by."""

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from vestige.errors import NonFinite
from vestige.runs._types import ScoreBlock

End = Literal["proponent", "opponent"]


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
    percentile: float
    """Share of all training examples with a smaller score, in percent."""


def block_arrays(block: ScoreBlock) -> tuple[Int[np.ndarray, "row"], Float[np.ndarray, "query row"]]:
    """Return rows (int64) and scores (float32, or float64 if given so) of a block on the CPU.

    Raises:
        NonFinite: a score is NaN or infinite.
    """
    rows = block.rows.cpu().numpy().astype(np.int64)
    tensor = block.scores.detach().cpu()
    scores = (tensor.float() if tensor.dtype.itemsize < 4 else tensor).numpy()
    if not np.isfinite(scores).all():
        query, column = np.argwhere(~np.isfinite(scores))[0]
        raise NonFinite(
            f"The score of training row {rows[column]} for query {query} is {scores[query, column]}.\n"
            "A loss or an activation overflowed: run again with --precision float32, or leave that row out, by hand or "
            "with --skip-bad, of vestige index where there is one."
        )
    return rows, scores


class TopK:
    """The `k` highest and `k` lowest scores of each query; equal scores are ordered by row number.

    The result does not depend on the order of the blocks or of the rows in them. With fewer than `2 k`
    training examples some are listed at both ends, since an end is a part of the ranking and no verdict.
    """

    def __init__(self, queries: int, k: int) -> None:
        self.k = k
        self._seen = 0
        self._highest = [_Highest(k) for _ in range(queries)]
        self._lowest = [_Highest(k) for _ in range(queries)]

    def add(self, rows: Int[np.ndarray, "row"], scores: Float[np.ndarray, "query row"]) -> None:
        """Add the scores of `rows`; every row may be given once."""
        self._seen += len(rows)
        for query, values in enumerate(scores):
            self._highest[query].add(rows, values)
            self._lowest[query].add(rows, -values)

    def rows(self, query: int, end: End) -> Int[np.ndarray, "rank"]:
        """Return the rows of one end, best first."""
        return (self._highest if end == "proponent" else self._lowest)[query].rows

    def scores(self, query: int, end: End) -> Float[np.ndarray, "rank"]:
        """Return the scores of one end in float64, best first."""
        if end == "proponent":
            return self._highest[query].keys
        return -self._lowest[query].keys

    def ranked(self) -> list[RankedScore]:
        """Return both ends of every query, with exact percentiles."""
        return [
            RankedScore(query, end, rank, int(row), float(score), float(percentile))
            for query in range(len(self._highest))
            for end in ("proponent", "opponent")
            for rank, (row, score, percentile) in enumerate(
                zip(
                    self.rows(query, end),
                    self.scores(query, end),
                    self._percentiles(query, end),
                    strict=True,
                ),
                start=1,
            )
        ]

    def _percentiles(self, query: int, end: End) -> Float[np.ndarray, "rank"]:
        # Exact although only 2 k scores are kept: whatever is larger than a kept high score (smaller than a
        # kept low one) is kept too, and ties with the last kept one are counted as they stream by.
        if end == "proponent":
            smaller = self._seen - self._highest[query].count_at_least()
        else:
            smaller = self._lowest[query].count_above()
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
        candidates = self._contenders(keys)
        all_rows = np.concatenate([self.rows, rows[candidates]])
        all_keys = np.concatenate([self.keys, keys[candidates]])
        order = np.lexsort((all_rows, -all_keys))[: self._k]
        last = all_keys[order[-1]] if len(order) else 0.0
        unmoved = full and last == self.keys[-1]
        already = self._ties if unmoved else int((self.keys == last).sum())
        self._ties = already + int((keys == last).sum())
        self.rows, self.keys = all_rows[order], all_keys[order]

    def _contenders(self, keys: Float[np.ndarray, "row"]) -> np.ndarray:
        """Return indices that can be among the k highest; all ties with the k-th, since the row decides."""
        if len(keys) <= self._k:
            return np.arange(len(keys))
        return np.flatnonzero(keys >= np.partition(keys, -self._k)[-self._k])

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
