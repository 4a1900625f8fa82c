"""`curves.parquet`: the losses of every set on the way up, for a figure or a second choice of when to stop."""

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vestige.storage import write_durably
from vestige.unlearn._job import UntracJob
from vestige.unlearn._losses import loss_weights
from vestige.unlearn._sets import NO_SOURCE, ExampleSet, set_means

if TYPE_CHECKING:
    from vestige.unlearn._untrac import Scored

CURVES_FILE = "curves.parquet"
SCHEMA = pa.schema(
    [
        ("ascent", pa.string()),
        ("step", pa.int64()),
        ("kind", pa.string()),
        ("set", pa.string()),
        ("loss", pa.float64()),
        ("mirrored", pa.float64()),
    ]
)


def write_curves(folder: Path, scored: "Scored") -> None:
    """Write a row for each measurement of each set (`measured`, step 0 the start), and each step's batch (`batch`).

    The column `kind` is `measured` or `batch`. Losses are in nats per weight (tokens, or examples for `loss=mean`);
    `mirrored` is the loss on the other side of the start, null where it was not measured. A batch's loss is the one
    before its step.
    """
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(_rows(scored), schema=SCHEMA), sink, compression="zstd")
    write_durably(Path(folder) / CURVES_FILE, [sink.getvalue()])


def _rows(scored: "Scored") -> list[dict[str, object]]:
    job, done = scored.job, scored.done
    sets = _measured_sets(job)
    counted = loss_weights(job.measured.data, job.settings.loss)[job.measured.rows]
    before, after = set_means(done.before, counted, sets), set_means(done.after, counted, sets)
    mirrored = set_means(done.mirrored, counted, sets) if done.mirrored.shape[1] else np.full(after.shape, np.nan)
    rows = []
    for number, ascended in enumerate(job.ascended.sets):
        for place, group in enumerate(sets):
            common = {"ascent": ascended.name, "kind": "measured", "set": group.name}
            rows.append({**common, "step": 0, "loss": before[place], "mirrored": before[place]})
            for point, step in enumerate(scored.recipe.looks):
                found = after[number, point, place], mirrored[number, point, place]
                rows.append({**common, "step": step, "loss": found[0], "mirrored": _or_null(found[1])})
        for step, loss in enumerate(done.batch_loss[number]):
            rows.append({"ascent": ascended.name, "kind": "batch", "set": ascended.name, "step": step, "loss": loss})
    return rows


def _measured_sets(job: UntracJob) -> list[ExampleSet]:
    """Return the measured sets as positions among the measured rows; single training examples by their source."""
    side = job.measured
    if job.settings.direction == "inverse" and job.settings.level == "example":
        names = [side.data.examples[row].source or NO_SOURCE for row in side.rows]
        return [ExampleSet(name, np.flatnonzero(np.array(names) == name)) for name in sorted(set(names))]
    return [ExampleSet(each.name, np.searchsorted(side.rows, each.rows)) for each in side.sets]


def _or_null(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
