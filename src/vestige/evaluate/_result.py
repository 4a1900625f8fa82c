"""The outcome of an evaluation of scores: a row for each method, as a table, as JSON and beside a figure."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from vestige.errors import CorruptFile, IndexMismatch, UserError
from vestige.evaluate._scored import Scored
from vestige.evaluate._statistics import Estimate
from vestige.parsing import parse_object
from vestige.progress import format_bytes, format_seconds
from vestige.storage import is_temporary, make_folder, remove_strays_of, write_durably
from vestige.terminal import as_text

Value = Estimate | float | int | str | None

TEXT_WIDTH = 160


@dataclass(frozen=True)
class EvaluationRow:
    """What was found of one method."""

    method: str
    values: Mapping[str, Value]
    """By column."""
    seconds: float | None = None
    """What the scores cost; None where nothing was computed."""
    memory_bytes: int | None = None
    opponent: bool = False

    @classmethod
    def of(cls, scored: Scored, values: Mapping[str, Value]) -> "EvaluationRow":
        """Return the row of one run, with its cost."""
        return cls(scored.name, values, scored.run.run.seconds, scored.run.run.peak_memory_bytes, scored.opponent)


@dataclass(frozen=True)
class Evaluation:
    """A table of methods: `str()` and `rich` print it, `to_json()` is what the file holds."""

    kind: str
    title: str
    rows: tuple[EvaluationRow, ...]
    notes: tuple[str, ...] = ()
    """How to read it, and what is missing."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What is in the file and not in the table; JSON terms."""
    files: tuple[str, ...] = ()

    def __getitem__(self, method: str) -> EvaluationRow:
        """Return the row of a method."""
        return next(row for row in self.rows if row.method == method)

    def __str__(self) -> str:
        return as_text(self, TEXT_WIDTH)

    def __rich__(self) -> Group:
        return Group(self.title, _table(self.rows), *self.notes, *self.files)

    def to_json(self) -> dict[str, Any]:
        """Return everything in JSON terms; intervals as [low, high], unknown numbers as null."""
        return {
            "kind": self.kind,
            "title": self.title,
            "rows": [
                {
                    "method": row.method,
                    "opponent": row.opponent,
                    **{name: as_plain(value) for name, value in row.values.items()},
                    "seconds": row.seconds,
                    "memory_bytes": row.memory_bytes,
                }
                for row in self.rows
            ],
            "notes": list(self.notes),
            **{name: as_plain(value) for name, value in self.details.items()},
        }


def write_evaluation(result: Evaluation, folder: Path, figure: Mapping[str, bytes]) -> Evaluation:
    """Write the result to its files: `KIND.json`, and the figure as PDF and PNG."""
    make_folder(folder)
    files = {f"{result.kind}.json": (json.dumps(result.to_json(), indent=1) + "\n").encode(), **figure}
    for name, content in files.items():
        remove_strays_of(folder / name)
        write_durably(folder / name, [content])
    return replace(result, files=tuple(str(folder / name) for name in files))


def as_plain(value: Any) -> Any:
    """Replace NaN, which JSON has not, by null."""
    if isinstance(value, Estimate):
        return {"value": as_plain(value.value), "interval": [as_plain(value.low), as_plain(value.high)]}
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): as_plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [as_plain(each) for each in value]
    return value


def _table(rows: Sequence[EvaluationRow]) -> Table:
    columns = list(dict.fromkeys(name for row in rows for name in row.values))
    table = Table()
    table.add_column("method", no_wrap=True)
    costs = ["seconds", *(["memory"] if any(row.memory_bytes is not None for row in rows) else [])]
    for name in (*columns, *costs):
        table.add_column(name, justify="right", no_wrap=True)
    for place, row in enumerate(rows):
        last_requested = not row.opponent and place + 1 < len(rows) and rows[place + 1].opponent
        table.add_row(
            row.method,
            *(format_value(row.values.get(name)) for name in columns),
            "" if row.seconds is None else format_seconds(row.seconds),
            *([] if len(costs) == 1 else ["" if row.memory_bytes is None else format_bytes(row.memory_bytes)]),
            end_section=last_requested,
        )
    return table


def format_value(value: Value) -> str:
    """Format a value for a table; empty where there is none."""
    if value is None:
        return ""
    if isinstance(value, str | int):
        return str(value)
    if isinstance(value, Estimate):
        if not value.is_known:
            return "undefined"
        known = math.isfinite(value.low)
        return (
            f"{_digits(value.value)} [{_digits(value.low)}, {_digits(value.high)}]" if known else _digits(value.value)
        )
    return _digits(value) if math.isfinite(value) else "undefined"


def _digits(value: float) -> str:
    return f"{value:.3f}" if abs(value) >= 0.01 or value == 0 else f"{value:.2g}"


def open_folder(folder: Path, identity: Mapping[str, Any], *own: str) -> None:
    """Open or begin a folder of results that all follow from `identity`, which `compared.json` in it holds.

    Raises:
        IndexMismatch: It holds results of something else; nothing was changed. The message shows the difference.
        CorruptFile: That file does not read.
        UserError: It holds other files than `own` and temporary ones.
    """
    path = folder / "compared.json"
    if not path.exists():
        known = {*own, path.name}
        foreign = not folder.is_dir() or any(
            one.name not in known and not is_temporary(one) for one in folder.iterdir()
        )
        if folder.exists() and foreign:
            raise UserError(f"{folder} holds other files. Give a new or empty folder as --out.")
        make_folder(folder)
        write_durably(path, [json.dumps(identity, indent=1).encode()])
        return
    try:
        found = parse_object(path.read_bytes())
    except ValueError as error:
        raise CorruptFile(f"{path} does not read as JSON ({error}). Give another --out.") from error
    names = [name for name in {**found, **identity} if found.get(name) != identity.get(name)]
    if names:
        lines = [f"  {name}: {_cut(found.get(name))} there, {_cut(identity.get(name))} now" for name in names]
        raise IndexMismatch(
            "\n".join([f"{folder} evaluated something else; nothing was changed.", *lines, "Give another --out."])
        )


def _cut(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
