"""The table of self-influence against a sort of everything; and the memory that writing takes."""

import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from vestige.runs import _self_influence
from vestige.runs._self_influence import SELF_INFLUENCE, write_self_influence


@pytest.mark.parametrize("kinds", [1, 4, 10_000])
@pytest.mark.parametrize("count", [0, 1, 16, 200])
def test_lines_are_highest_first_and_equal_ones_by_row(kinds, count, tmp_path, monkeypatch):
    monkeypatch.setattr(_self_influence, "_ROWS_AT_ONCE", 16)
    random = np.random.default_rng(count)
    scores = random.integers(kinds, size=count) / 7
    scores[random.random(count) < 0.1] = np.nan
    names = [f"example {row}" for row in range(count)]
    write_self_influence(tmp_path / "table.parquet", scores, names)
    order = sorted(np.flatnonzero(~np.isnan(scores)).tolist(), key=lambda row: (-scores[row], row))
    table = parquet.read_table(tmp_path / "table.parquet")
    assert table.schema.equals(SELF_INFLUENCE)
    assert table.to_pydict() == {
        "example_id": [names[row] for row in order],
        "row": order,
        "score": [scores[row] for row in order],
    }


@pytest.mark.slow
def test_writing_takes_little_memory_for_each_example(tmp_path):
    before, pool = pa.default_memory_pool(), pa.system_memory_pool()

    def peak(count):
        scores = np.random.default_rng(0).random(count)
        tracemalloc.start()
        write_self_influence(tmp_path / str(count), scores, (f"example-{row}" for row in range(count)))
        found = tracemalloc.get_traced_memory()[1] + pool.max_memory()
        tracemalloc.stop()
        return found

    pa.set_memory_pool(pool)
    try:
        peak(100_000)
        few, many = peak(200_000), peak(800_000)
    finally:
        pa.set_memory_pool(before)
    assert (many - few) / 600_000 < 64 + 3 * 16
