"""The evidence on disk: a row per example, a column per measure, so that one measure is read without the others."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as compute
import pyarrow.parquet as parquet
from jaxtyping import Float

from vestige.errors import DataError
from vestige.storage import write_durably
from vestige.tables import reading

KEYS = ("checkpoint", "layer", "row", "example_id")
REMEDY = "Make the audit again."


def evidence_table(
    example_ids: Sequence[str],
    measures: Mapping[str, Float[np.ndarray, "example"]],
    *,
    checkpoint: int = -1,
    layer: int | None = None,
    rows: Sequence[int] | None = None,
) -> pa.Table:
    """Return what was measured at one checkpoint, and at one layer if the measures have one.

    Args:
        example_ids: In the order of the values.
        measures: By name; NaN, which becomes null, where a measure cannot be computed.
        checkpoint: Steps trained; -1 for a model whose steps are not known.
        layer: None for measures without layers.
        rows: Positions of the examples, where ids may repeat; a column of its own.

    Raises:
        DataError: A measure that has not one value per example, or the name of a key.
    """
    for name, values in measures.items():
        if name in KEYS or np.shape(values) != (len(example_ids),):
            raise DataError(
                f"Measure {name!r} of shape {np.shape(values)} does not go with {len(example_ids)} examples."
            )
    count = len(example_ids)
    return pa.table(
        {
            "checkpoint": pa.array([checkpoint] * count, pa.int64()),
            "layer": pa.array([layer] * count, pa.int32()),
            **({} if rows is None else {"row": pa.array(list(rows), pa.int64())}),
            "example_id": pa.array(list(example_ids), pa.string()),
            **{
                name: pa.array(np.asarray(values, dtype=np.float64), from_pandas=True)
                for name, values in measures.items()
            },
        }
    )


def write_evidence(path: str | Path, tables: Sequence[pa.Table]) -> None:
    """Put tables of all checkpoints and layers into one Parquet file; a measure that one of them lacks is null there.

    Raises:
        DataError: There is no table, or two hold the same checkpoint, layer and example.
    """
    if not tables:
        raise DataError("There is no evidence to write.")
    whole = pa.concat_tables(tables, promote_options="default")
    keys = ["checkpoint", "layer", "row" if "row" in whole.column_names else "example_id"]
    distinct = whole.select(keys).group_by(keys).aggregate([])
    if len(distinct) != len(whole):
        raise DataError("Two rows are about the same example at the same checkpoint and layer. Merge their measures.")
    sink = pa.BufferOutputStream()
    parquet.write_table(whole, sink)
    write_durably(Path(path), [sink.getvalue().to_pybytes()])


def read_evidence(
    path: str | Path, measures: Sequence[str] | None = None, *, checkpoint: int | None = None
) -> pa.Table:
    """Return the evidence, or some measures of it, or one checkpoint.

    Raises:
        DataError: A measure that the file does not hold.
        CorruptFile: It does not read.
    """
    path = Path(path)
    with reading(path, REMEDY):
        held = parquet.read_schema(path).names
    keys = [name for name in KEYS if name in held]
    wanted = held if measures is None else [*keys, *measures]
    if unknown := sorted(set(wanted) - set(held)):
        raise DataError(f"{path} holds no {', '.join(unknown)}; it holds {', '.join(held[len(keys) :])}.")
    with reading(path, REMEDY):
        table = parquet.read_table(path, columns=wanted, memory_map=False)
    return table if checkpoint is None else table.filter(compute.field("checkpoint") == checkpoint)
