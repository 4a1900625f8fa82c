"""The evidence of an audit for other programs: as CSV, JSON or a `datasets` folder."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import csv

from vestige.errors import SpecError
from vestige.files import write_durably
from vestige.runs import Audit
from vestige.settings import RunFormat

_TEXTS = ["row", "part", "source", "label", "class", "flag", "targets", "text"]


def write_audit_as(audit: Audit, out: Path, to: RunFormat) -> list[Path]:
    """Write an audit's evidence to `out`: a row per example, checkpoint and layer, with the example's text.

    - `csv`: `evidence.csv`;
    - `json`: `evidence.json`: the run's record, and the same rows; what cannot be computed is null;
    - `datasets`: the same rows, for `datasets.load_from_disk`.

    Raises:
        SpecError: Similarities, which an audit has none of.
    """
    if to == "similarities":
        raise SpecError(f"{audit.folder} is an audit and holds no similarities. Expected one of: csv, json, datasets.")
    table = _whole(audit)
    if to == "datasets":
        from datasets import Dataset

        Dataset(table).save_to_disk(str(out))
        return [out]
    path = out / f"evidence.{to}"
    if to == "csv":
        sink = pa.BufferOutputStream()
        csv.write_csv(table, sink)
        write_durably(path, [sink.getvalue().to_pybytes()])
    else:
        content = {"run": audit.run.model_dump(mode="json"), "evidence": table.to_pylist()}
        write_durably(path, [json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n"])
    return [path]


def _whole(audit: Audit) -> pa.Table:
    """Return the evidence with the columns of the examples beside it, in the order of the evidence."""
    evidence, examples = audit.table(), audit.examples.select(_TEXTS)
    rows = examples["row"].to_numpy()
    order = np.argsort(rows)
    described = examples.take(order[np.searchsorted(rows, evidence["row"].to_numpy(), sorter=order)])
    for name in _TEXTS[1:]:
        evidence = evidence.append_column(name, described[name])
    return evidence
