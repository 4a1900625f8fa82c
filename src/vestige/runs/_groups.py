"""The scores of each source: sum, spread, and the positive ones alone."""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Float, Int

from vestige.runs._record import GroupRecord

NO_SOURCE = "(no source)"


class Groups:
    """Sum and spread of the scores of each source."""

    def __init__(self, queries: int, sources: Iterable[str | None] | None) -> None:
        """Make one for `queries` queries; `sources` has that of every example, in order."""
        met: dict[str, int] = {}
        numbers = (met.setdefault(source or NO_SOURCE, len(met)) for source in sources or ())
        self._group = np.fromiter(numbers, np.int32)
        self._names = list(met) if met.keys() - {NO_SOURCE} else []
        self._sizes = np.zeros(len(self._names), dtype=np.int64)
        self._sum = np.zeros((queries, len(self._names)))
        self._squares = np.zeros((queries, len(self._names)))
        self._positive, self._positive_squares = np.zeros_like(self._sum), np.zeros_like(self._sum)

    def add(self, rows: Int[np.ndarray, "row"], scores: Float[np.ndarray, "query row"]) -> None:
        """Add the scores of `rows`; every row may be given once."""
        if not self._names or len(rows) == 0:
            return
        group = self._group[rows]
        order = np.argsort(group, kind="stable")
        present, starts, sizes = np.unique(group[order], return_index=True, return_counts=True)
        values = scores[:, order].astype(np.float64)
        self._sizes[present] += sizes
        self._sum[:, present] += np.add.reduceat(values, starts, axis=1)
        self._squares[:, present] += np.add.reduceat(values**2, starts, axis=1)
        above = np.maximum(values, 0)
        self._positive[:, present] += np.add.reduceat(above, starts, axis=1)
        self._positive_squares[:, present] += np.add.reduceat(above**2, starts, axis=1)

    def records(self, query: int) -> list[GroupRecord]:
        """Return one record for each source that has rows, largest sum first."""
        records = [
            GroupRecord(
                source=name,
                examples=size,
                sum=float(self._sum[query, at]),
                mean=float(self._sum[query, at]) / size,
                **_interval(size, float(self._sum[query, at]), float(self._squares[query, at])),
                positive=float(self._positive[query, at]),
                positive_squares=float(self._positive_squares[query, at]),
            )
            for at, (name, size) in enumerate(zip(self._names, self._sizes.tolist(), strict=True))
            if size
        ]
        return sorted(records, key=lambda record: (-record.sum, record.source))


def _interval(size: int, total: float, squares: float) -> dict[str, float | None]:
    """Return Student's 95% interval of the mean; too narrow when a few examples hold most of the sum."""
    if size == 1:
        return {"low": None, "high": None}
    mean = total / size
    half = student_half_width(size) * (variance_of(size, total, squares) / size) ** 0.5
    return {"low": mean - half, "high": mean + half}


def variance_of(size: int, total: float, squares: float) -> float:
    """Return the sample variance of `size` numbers of which the sum and the sum of squares are known."""
    return max(squares - total**2 / size, 0.0) / (size - 1)


def student_half_width(size: int) -> float:
    """Return the half width of Student's 95% interval of a mean of `size` numbers, in standard errors."""
    from scipy.special import stdtrit  # a tenth of a second, which reading a run does not need

    return float(stdtrit(size - 1, 0.975))
