"""The scores of a run for other programs: a table as CSV, JSON or a `datasets` folder."""

import csv
import io
import json
from pathlib import Path
from typing import Any

from vestige.runs import Scores
from vestige.storage import write_durably

_OF_ROW = ("rank", "example_id", "score", "percentile", "text", "source", "row")


def write_csv(scores: Scores, out: Path) -> list[Path]:
    """Write `scores.csv`: one row per listed score, with the text of the example."""
    content = io.StringIO()
    writer = csv.DictWriter(content, ["query_id", "end", *_OF_ROW], lineterminator="\n")
    writer.writeheader()
    writer.writerows(_rows(scores))
    write_durably(out / "scores.csv", [content.getvalue().encode()])
    return [out / "scores.csv"]


def write_json(scores: Scores, out: Path) -> list[Path]:
    """Write `scores.json`: what the scores mean, and the rows of `scores.csv`."""
    run = scores.run
    content = {"method": run.method, "meaning": run.meaning.to_dict(), "command": run.command, "scores": _rows(scores)}
    write_durably(out / "scores.json", [json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n"])
    return [out / "scores.json"]


def write_dataset(scores: Scores, out: Path) -> list[Path]:
    """Write the rows of `scores.csv` as a folder for `datasets.load_from_disk`."""
    from datasets import Dataset

    Dataset.from_list(_rows(scores)).save_to_disk(str(out))
    return [out]


def _rows(scores: Scores) -> list[dict[str, Any]]:
    """Return one dictionary per listed score, proponents before opponents."""
    every = scores.run.data.examples
    return [
        {"query_id": query, "end": end, **{name: getattr(row, name) for name in _OF_ROW}}
        for query in scores.queries
        for end, table in (("proponent", scores.top(query, every)), ("opponent", scores.bottom(query, every)))
        for row in table
    ]
