"""The scores of a run for other programs: a table as CSV or as a `datasets` folder, JSON, published similarities."""

import csv
import io
import json
from pathlib import Path
from typing import Any

from vestige.errors import SpecError
from vestige.files import write_durably
from vestige.runs import Scores
from vestige.settings import RunFormat

_OF_ROW = ("rank", "example_id", "score", "percentile", "text", "source", "row")


def write_run_as(scores: Scores, out: Path, to: RunFormat) -> list[Path]:
    """Write the listed scores of a run to the folder `out`.

    - `csv`: `scores.csv`, one row per listed score, with the text of the example;
    - `json`: `scores.json`: what the scores mean, and the same rows;
    - `datasets`: the same rows, for `datasets.load_from_disk`;
    - `similarities`: `similarities.json`, `{query: {example: score}}`, highest score first.

    Raises:
        SpecError: A query lists two examples with one id, which similarities cannot distinguish.
    """
    if to == "similarities":
        content: Any = _similarities(scores)
        path = out / "similarities.json"
        # The published files are indented by four.
        write_durably(path, [json.dumps(content, indent=4, ensure_ascii=False).encode() + b"\n"])
        return [path]
    rows = _rows(scores)
    if to == "datasets":
        from datasets import Dataset

        Dataset.from_list(rows).save_to_disk(str(out))
        return [out]
    path = out / f"scores.{to}"
    if to == "csv":
        write_durably(path, [_csv(rows).encode()])
    else:
        run = scores.run
        content = {"method": run.method, "meaning": run.meaning.to_dict(), "command": run.command, "scores": rows}
        write_durably(path, [json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n"])
    return [path]


def _rows(scores: Scores) -> list[dict[str, Any]]:
    """Return one dictionary per listed score, proponents before opponents."""
    every = scores.run.data.examples
    return [
        {"query_id": query, "end": end, **{name: getattr(row, name) for name in _OF_ROW}}
        for query in scores.queries
        for end, table in (("proponent", scores.top(query, every)), ("opponent", scores.bottom(query, every)))
        for row in table
    ]


def _csv(rows: list[dict[str, Any]]) -> str:
    content = io.StringIO()
    writer = csv.DictWriter(content, ["query_id", "end", *_OF_ROW], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return content.getvalue()


def _similarities(scores: Scores) -> dict[str, dict[str, float]]:
    content: dict[str, dict[str, float]] = {}
    for query in scores.queries:
        listed: dict[int, tuple[str, float]] = {}
        every = scores.run.data.examples
        # Opponents from the highest on: what is listed at both ends keeps its rank among the proponents.
        for row in (*scores.top(query, every), *reversed(scores.bottom(query, every))):
            listed.setdefault(row.row, (row.example_id, row.score))
        content[query] = dict(listed.values())
        if len(content[query]) < len(listed):
            raise SpecError(f"Query {query!r} lists two examples with one id. Type --to json, which keeps both.")
    return content
