"""The headline figures of a finished cell, read from the JSON files that its command left."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vestige.parsing import parse_json

MOST_FIGURES = 200
_LARGEST_FILE = 16 * 2**20
_NAMES = ("name", "method", "measure", "domain", "query")
"""What names a row of a table."""
_TABLES = ("rows", "gates", "checks", "measures")
_NOT_FIGURES = ("format", "seed", "config", "settings", "identity", "manifest")


def figures_of(out: Path) -> dict[str, Any]:
    """Return numbers by name, such as `seconds`, `trust.coverage` or `rows.influence.LDS`, from the files in `out`.

    A single number keeps its name; the rows of a table, and the checks and gates of a record, are named after what they
    are about. What is nested deeper, and lists of numbers, are left to the files themselves.
    """
    found = _alarm(out / "at_risk.parquet")
    for path in sorted(out.glob("*.json")):
        for name, value in _figures(_read(path)):
            found.setdefault(name, value)
    return dict(list(found.items())[:MOST_FIGURES])


def _alarm(path: Path) -> dict[str, Any]:
    """Return when an alarm rang, and how many examples it flagged; nothing where there is no alarm."""
    if not path.exists():
        return {}
    import pyarrow.parquet as parquet

    listed = parquet.read_table(path, columns=["flagged", "step"], memory_map=False)
    return {"alarm.step": listed["step"][0].as_py(), "alarm.flagged": sum(listed["flagged"].to_pylist())}


def _read(path: Path) -> Any:
    try:
        return parse_json(path.read_bytes()) if path.stat().st_size <= _LARGEST_FILE else None
    except (OSError, ValueError):
        return None


def _figures(content: Any) -> Iterator[tuple[str, Any]]:
    for name, value in content.items() if isinstance(content, Mapping) else ():
        if name in _NOT_FIGURES:
            continue
        if _is_figure(value):
            yield name, value
        elif isinstance(value, Mapping):
            yield from ((f"{name}.{key}", each) for key, each in value.items() if _is_figure(each))
            for table in _TABLES:
                yield from _rows(name, value.get(table))
        elif name in _TABLES:
            yield from _rows(name, value)


def _rows(prefix: str, rows: Any) -> Iterator[tuple[str, Any]]:
    for row in rows if isinstance(rows, list) else ():
        named = next((str(row[key]) for key in _NAMES if key in row), None) if isinstance(row, Mapping) else None
        if named is None:
            continue
        for key, value in row.items():
            # An estimate with its interval, as evaluations write it.
            number = value.get("value") if isinstance(value, Mapping) else value
            if _is_figure(number):
                yield f"{prefix}.{named}.{key}", number


def _is_figure(value: Any) -> bool:
    return isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value))
