"""Numbers that come for rows in any order, sorted into the order of the rows with little memory."""

from collections.abc import Iterator
from typing import final

import numpy as np
from jaxtyping import Float, Int

from vestige import disk_arrays

WINDOW = 2**16
"""Rows that are processed at once."""
_LINES = 16
"""Lines that are brought into order at once."""


@final
class RowOrder:
    """Lines of numbers, one for each row, that are on the disk; every row may be given once.

    Written where they belong, the numbers of a few rows from all over would touch the whole array. So those of a window
    of rows are kept in order of arrival first, with their positions in the window.
    """

    def __init__(self, lines: int, rows: int, dtype: np.typing.DTypeLike) -> None:
        """Start with no numbers.

        Args:
            lines: Numbers of each row.
            rows: How many there are.
            dtype: Of the numbers: floating point.

        Raises:
            DiskSpaceError: They do not fit on the disk for temporary files.
        """
        self._values = disk_arrays.zeros((lines, rows), dtype)
        self._places = disk_arrays.zeros(rows, np.min_scalar_type(WINDOW - 1))
        self._arrived = np.zeros(-(-rows // WINDOW), dtype=np.int64)

    def add(self, rows: Int[np.ndarray, "row"], values: Float[np.ndarray, "line row"]) -> None:
        """Add the numbers of some rows."""
        for window, part in by_window(rows):
            begin = window * WINDOW + int(self._arrived[window])
            self._values[:, begin : begin + len(part)] = values[:, part]
            self._places[begin : begin + len(part)] = rows[part] - window * WINDOW
            self._arrived[window] += len(part)
        disk_arrays.let_go(self._values, self._places)

    def finish(self) -> Float[np.ndarray, "line row"]:
        """Return the array on the disk, in the order of the rows; NaN for those that were not given."""
        for window, rows in enumerate(windows(self._values.shape[1])):
            arrived = slice(rows.start, rows.start + int(self._arrived[window]))
            places = self._places[arrived].astype(np.intp)
            for first in range(0, len(self._values), _LINES):
                lines = self._values[first : first + _LINES]
                ordered = np.full((len(lines), rows.stop - rows.start), np.nan, lines.dtype)
                ordered[:, places] = lines[:, arrived]
                lines[:, rows] = ordered
                disk_arrays.let_go(self._values)
        disk_arrays.let_go(self._places)
        return self._values


def windows(rows: int) -> Iterator[slice]:
    """Yield all rows in order, `WINDOW` at a time."""
    return (slice(start, min(start + WINDOW, rows)) for start in range(0, rows, WINDOW))


def by_window(rows: Int[np.ndarray, "row"]) -> Iterator[tuple[int, Int[np.ndarray, "part"]]]:
    """Yield numbers of the windows in which the rows lie, ascending, and where among `rows` those of each are."""
    order = np.argsort(rows, kind="stable")
    numbers, starts = np.unique(rows[order] // WINDOW, return_index=True)
    return zip(numbers.tolist(), np.split(order, starts)[1:], strict=True)
