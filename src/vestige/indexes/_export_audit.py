"""The evidence of an audit for other programs: as CSV, JSON or a `datasets` folder."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import csv

from vestige.runs import Audit
from vestige.storage import write_durably

_TEXTS = ["row", "part", "source", "label", "class", "flag", "targets", "text"]


def write_csv(audit: Audit, out: Path) -> list[Path]:
    """Write `evidence.csv`: a row per example, checkpoint and layer, with the example's text."""
    sink = pa.BufferOutputStream()
    csv.write_csv(_whole(audit), sink)
    write_durably(out / "evidence.csv", [sink.getvalue().to_pybytes()])
    return [out / "evidence.csv"]


def write_json(audit: Audit, out: Path) -> list[Path]:
    """Write `evidence.json`: the record of the run, and the rows of `evidence.csv`; what is not computed is null."""
    content = {"run": audit.run.model_dump(mode="json"), "evidence": _whole(audit).to_pylist()}
    write_durably(out / "evidence.json", [json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n"])
    return [out / "evidence.json"]


def write_dataset(audit: Audit, out: Path) -> list[Path]:
    """Write the rows of `evidence.csv` as a folder for `datasets.load_from_disk`."""
    from datasets import Dataset

    Dataset(_whole(audit)).save_to_disk(str(out))
    return [out]


def _whole(audit: Audit) -> pa.Table:
    """Return the evidence with the columns of the examples beside it, in the order of the evidence."""
    evidence, examples = audit.table(), audit.examples.select(_TEXTS)
    rows = examples["row"].to_numpy()
    order = np.argsort(rows)
    described = examples.take(order[np.searchsorted(rows, evidence["row"].to_numpy(), sorter=order)])
    for name in _TEXTS[1:]:
        evidence = evidence.append_column(name, described[name])
    return evidence
