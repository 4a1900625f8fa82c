"""The scores of a run for other programs: a table as CSV, JSON or a `datasets` folder."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import csv as arrow_csv

from vestige.runs import Audit, Scores
from vestige.storage import write_durably

_OF_ROW = ("rank", "example_id", "score", "percentile", "text", "source", "row")


def write_run_csv(scores: Scores, out: Path) -> list[Path]:
    """Write `scores.csv`: one row per listed score, with the text of the example."""
    content = io.StringIO()
    writer = csv.DictWriter(content, ["query_id", "end", *_OF_ROW], lineterminator="\n")
    writer.writeheader()
    writer.writerows(_list_rows(scores))
    write_durably(out / "scores.csv", [content.getvalue().encode()])
    return [out / "scores.csv"]


def write_run_json(scores: Scores, out: Path) -> list[Path]:
    """Write `scores.json`: what the scores mean, and the rows of `scores.csv`."""
    run = scores.run
    content = {
        "method": run.method,
        "meaning": run.meaning.to_dict(),
        "command": run.command,
        "scores": _list_rows(scores),
    }
    write_durably(out / "scores.json", [json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n"])
    return [out / "scores.json"]


def write_run_dataset(scores: Scores, out: Path) -> list[Path]:
    """Write the rows of `scores.csv` as a folder for `datasets.load_from_disk`."""
    from datasets import Dataset

    Dataset.from_list(_list_rows(scores)).save_to_disk(str(out))
    return [out]


def _list_rows(scores: Scores) -> list[dict[str, Any]]:
    """Return one dictionary per listed score, proponents before opponents."""
    every = scores.run.data.examples
    return [
        {"query_id": query, "end": end, **{name: getattr(row, name) for name in _OF_ROW}}
        for query in scores.queries
        for end, table in (("proponent", scores.top(query, every)), ("opponent", scores.bottom(query, every)))
        for row in table
    ]


_TEXTS = ["row", "part", "source", "label", "class", "flag", "targets", "text"]


def write_audit_csv(audit: Audit, out: Path) -> list[Path]:
    """Write `evidence.csv`: a row per example, checkpoint and layer, with the example's text."""
    sink = pa.BufferOutputStream()
    arrow_csv.write_csv(_whole(audit), sink)
    write_durably(out / "evidence.csv", [sink.getvalue().to_pybytes()])
    return [out / "evidence.csv"]


def write_audit_json(audit: Audit, out: Path) -> list[Path]:
    """Write `evidence.json`: the record of the run, and the rows of `evidence.csv`; what is not computed is null."""
    content = {"run": audit.run.model_dump(mode="json"), "evidence": _whole(audit).to_pylist()}
    write_durably(out / "evidence.json", [json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n"])
    return [out / "evidence.json"]


def write_audit_dataset(audit: Audit, out: Path) -> list[Path]:
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
