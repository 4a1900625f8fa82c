"""`self_influence.parquet`: all training examples by their score for themselves, highest first."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float

from vestige.runs._dense import id_array

SELF_INFLUENCE = pa.schema([("example_id", pa.string()), ("row", pa.int64()), ("score", pa.float64())])
_PAGE_BYTES = 2**16
"""Bytes of a column that are read at once."""
_ROWS_AT_ONCE = 2**16


def write_self_influence(path: Path, scores: Float[np.ndarray, "example"], ids: Iterable[str]) -> None:
    """Write the table: every training example with its score for itself, highest first, ties by row.

    Examples that were left out have NaN, and no line. In memory are the ids and 24 bytes more for each example.

    Raises:
        DiskSpaceError: The disk is full.
    """
    # NaN is last in any order of numbers.
    scores = scores.astype(np.float64)
    order = np.argsort(-scores, kind="stable")[: np.count_nonzero(~np.isnan(scores))]
    # One array, for each `take` would join its parts again.
    names = id_array(ids).cast(pa.large_string()).combine_chunks()
    # Hardly a value comes twice: dictionaries would make the file larger, and are in memory until they are given up.
    settings: dict[str, Any] = {"compression": "zstd", "use_dictionary": False, "data_page_size": _PAGE_BYTES}
    with pq.ParquetWriter(path, SELF_INFLUENCE, **settings) as writer:
        for start in range(0, len(order), _ROWS_AT_ONCE):
            rows = order[start : start + _ROWS_AT_ONCE]
            columns = [names.take(pa.array(rows)).cast(pa.string()), rows, scores[rows]]
            writer.write_table(pa.table(columns, schema=SELF_INFLUENCE))
