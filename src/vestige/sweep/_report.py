"""What has come of a sweep: a row a cell, read from the markers, for a person and as a table."""

import io
import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vestige.files import write_durably
from vestige.launch import JobStatus, job_statuses
from vestige.progress import format_seconds
from vestige.sweep._cells import Cells
from vestige.sweep._files import LOG_FILE, read_done, write_json
from vestige.sweep._grid import Grid
from vestige.sweep._links import link_cells
from vestige.sweep._record import SWEEP, CellRecord, SweepRecord, is_sweep, read_sweep, record_of
from vestige.terminal import as_text

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

TABLE_FILE, JSON_FILE = "cells.parquet", "cells.json"
SHOWN_CELLS, SHOWN_FIGURES, SHOWN_FAILURES = 40, 4, 5
"""What fits on a screen; the files hold everything."""
_OF_THE_MACHINE = ("seconds", "peak_memory_bytes")
_STATES = ("done", "running", "failed", "missing")


@dataclass(frozen=True)
class CellRow:
    """A cell and what has become of it."""

    cell: str
    state: str
    """done, running, failed or missing."""
    folder: str
    """What the verb got as --out."""
    point: dict[str, Any]
    """The cell's values along the axes."""
    settings: dict[str, Any]
    figures: dict[str, Any]
    """Numbers that the verb left, by name; empty unless it is done."""
    seconds: float | None
    error: str
    log: str


@dataclass(frozen=True)
class SweepReport:
    """All cells of a sweep, in the order of the grid."""

    out: Path
    verb: str
    grid: str
    axes: tuple[str, ...]
    rows: tuple[CellRow, ...]

    def counts(self) -> dict[str, int]:
        """Cells by state."""
        counted = Counter(row.state for row in self.rows)
        return {state: counted[state] for state in _STATES if counted[state]}

    def __getitem__(self, point: dict[str, Any]) -> CellRow:
        """The first cell with these values along the axes."""
        return next(row for row in self.rows if point.items() <= row.point.items())

    def to_dict(self) -> dict[str, Any]:
        """Everything in JSON terms."""
        return {
            "verb": self.verb,
            "grid": self.grid,
            "axes": list(self.axes),
            "cells": [asdict(row) for row in self.rows],
        }

    def __str__(self) -> str:
        return as_text(self, _TEXT_WIDTH, soft_wrap=True)

    def __rich__(self) -> "Group":
        from rich.console import Group
        from rich.text import Text

        states = ", ".join(f"{count:,} {state}" for state, count in self.counts().items())
        lines = [f"{self.out}: sweep of `vestige {self.verb}`, {len(self.rows):,} cells: {states}"]
        more = len(self.rows) - SHOWN_CELLS
        after = [f"... and {more:,} more cells: {self.out / TABLE_FILE} holds all."] if more > 0 else []
        failed = [row for row in self.rows if row.state == "failed"]
        after += [f"failed  {row.error}" for row in failed[:SHOWN_FAILURES]]
        after += [f"... and {len(failed) - SHOWN_FAILURES} more failed."] if len(failed) > SHOWN_FAILURES else []
        return Group(*map(Text, lines), _table(self), *map(Text, after))


_TEXT_WIDTH = 160


def sweep_report(folder: Path) -> SweepReport:
    """How far the sweep in a folder is, by the markers of its cells.

    Raises:
        UserError: No sweep was begun there.
    """
    job = next((job for job in job_statuses(folder) if job.name == SWEEP), None)
    return _report(folder, read_sweep(folder), job)


def sweep_status(folder: Path) -> str | None:
    """Return the report of a sweep as text; None for a folder that is none."""
    return str(sweep_report(folder)) if is_sweep(folder) else None


def planned_report(folder: Path, grid: Grid, cells: Cells) -> SweepReport:
    """The cells that a grid would run, and which of them are done; nothing need be there."""
    return _report(folder, record_of(grid, cells), None)


def write_tables(report: SweepReport) -> SweepReport:
    """The report, which is now in `cells.json` and `cells.parquet` too, with a link to each result in `named/`."""
    import pyarrow.parquet as parquet

    link_cells(report.out, ((row.cell, row.point) for row in report.rows if row.state == "done"))
    write_json(report.out / JSON_FILE, report.to_dict())
    sink = io.BytesIO()
    parquet.write_table(_columns(report), sink)
    write_durably(report.out / TABLE_FILE, [sink.getvalue()])
    return report


def _report(folder: Path, record: SweepRecord, job: JobStatus | None) -> SweepReport:
    failures = {failure.piece: failure for failure in job.failures} if job else {}
    running = set(job.running) if job else set()
    rows = []
    for number, cell in enumerate(record.cells):
        failure = failures.get(number)
        rows.append(_row(folder, cell, number in running, failure.error if failure else ""))
    return SweepReport(folder, record.verb, record.grid, record.axes, tuple(rows))


def _row(folder: Path, cell: CellRecord, running: bool, error: str) -> CellRow:
    home = folder / "cells" / cell.id
    done = read_done(home, cell.id)
    state = "done" if done else "running" if running else "failed" if error else "missing"
    log = home / LOG_FILE
    return CellRow(
        cell.id,
        state,
        str(home / "out"),
        cell.point,
        cell.settings,
        done.figures if done else {},
        done.seconds if done else None,
        "" if done else error,
        str(log) if log.exists() else "",
    )


def _table(report: SweepReport) -> "Table":
    from rich.table import Table

    shown = report.rows[:SHOWN_CELLS]
    figures = _differing([row.figures for row in shown])[:SHOWN_FIGURES]
    table = Table()
    for column in ("cell", *report.axes, "state", "time", *figures):
        table.add_column(column, overflow="fold")
    for row in shown:
        took = "" if row.seconds is None else format_seconds(row.seconds)
        values = [_shown(row.point.get(axis)) for axis in report.axes]
        table.add_row(row.cell, *values, row.state, took, *(_shown(row.figures.get(name)) for name in figures))
    return table


def _differing(figures: list[dict[str, Any]]) -> list[str]:
    """Names of figures that are not the same in all cells, nor about the machine."""
    names = dict.fromkeys(name for each in figures for name in each)
    held = {name: {each[name] for each in figures if name in each} for name in names}
    return [name for name, values in held.items() if name not in _OF_THE_MACHINE and len(values) > 1]


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _columns(report: SweepReport) -> Any:
    """A pyarrow table: state, seconds and so on, then `settings.*`, then `figures.*`."""
    import pyarrow as arrow

    plain = ("cell", "state", "seconds", "folder", "error", "log")
    columns: dict[str, list[Any]] = {name: [getattr(row, name) for row in report.rows] for name in plain}
    for kind in ("settings", "figures"):
        held = [{**row.settings, **row.point} if kind == "settings" else row.figures for row in report.rows]
        for name in dict.fromkeys(name for row in held for name in row):
            columns[f"{kind}.{name}"] = _alike([row.get(name) for row in held])
    types = {"seconds": arrow.float64()}
    return arrow.table({name: arrow.array(values, types.get(name)) for name, values in columns.items()})


def _alike(values: list[Any]) -> list[Any]:
    """Values of one type, which a column needs: numbers as numbers, anything mixed or nested as JSON text."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float}:
        return [None if value is None else float(value) for value in values] if float in kinds else values
    return values if kinds in ({str}, {bool}) else [None if value is None else json.dumps(value) for value in values]
