"""Numbers that come in any order, against an array in memory."""

import tracemalloc

import numpy as np
import pytest

from vestige import row_order
from vestige.row_order import RowOrder, by_window, windows


@pytest.fixture
def small_windows(monkeypatch):
    for name, value in (("WINDOW", 8), ("_LINES", 2)):
        monkeypatch.setattr(row_order, name, value)


@pytest.mark.parametrize("step", [1, 7, 61])
def test_numbers_come_in_the_order_of_their_rows(step, small_windows):
    random = np.random.default_rng(step)
    values, order = random.normal(size=(5, 61)), random.permutation(61)[:50]
    ordered = RowOrder(5, 61, np.float64)
    for start in range(0, len(order), step):
        rows = order[start : start + step]
        ordered.add(rows, values[:, rows])
    expected = np.full((5, 61), np.nan)
    expected[:, order] = values[:, order]
    assert np.array_equal(ordered.finish(), expected, equal_nan=True)


def test_there_may_be_nothing():
    ordered = RowOrder(2, 3, np.float32)
    ordered.add(np.arange(0), np.zeros((2, 0)))
    assert np.isnan(ordered.finish()).all()
    assert RowOrder(2, 0, np.float32).finish().shape == (2, 0)


def test_windows_hold_every_row_once(small_windows):
    assert [(part.start, part.stop) for part in windows(20)] == [(0, 8), (8, 16), (16, 20)]
    rows = np.array([9, 0, 17, 8, 7])
    assert [(window, part.tolist()) for window, part in by_window(rows)] == [(0, [1, 4]), (1, [3, 0]), (2, [2])]


def test_memory_does_not_grow_with_the_rows():
    def peak(rows):
        tracemalloc.start()
        ordered = RowOrder(2, rows, np.float32)
        for start in range(0, rows, 4096):
            part = np.arange(start, min(start + 4096, rows))
            ordered.add(part, np.zeros((2, len(part))))
        ordered.finish()
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(100_000)
    assert (peak(2_000_000) - peak(100_000)) / 1_900_000 < 0.1
