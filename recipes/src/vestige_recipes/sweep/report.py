"""The result of a sweep: a row for each cell, read from the markers, for a person and as a table."""

import contextlib
import json
import os
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field

from vestige.errors import CorruptFile, UserError
from vestige.jobs import JobStatus, job_statuses
from vestige.parsing import parse_object
from vestige.progress import format_seconds
from vestige.storage import make_folder, temporary_path
from vestige.terminal import as_text
from vestige.workspace import Kind, Summary
from vestige_recipes.sweep.cell_files import LOG_FILE, read_done, write_json
from vestige_recipes.sweep.cells import ID_DIGITS, Cell, Grid, name_of

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table


JOB = "Sweep"
"""Name of the plan, under which its job is found."""
SWEEP_FILE, GRIDS = "sweep.json", "grids"
_FORMAT = 1


class CellRecord(BaseModel):
    """A cell as the sweep's record names it."""

    id: str = Field(pattern=f"^[0-9a-f]{{{ID_DIGITS}}}$")
    point: dict[str, Any]
    settings: dict[str, Any]
    """Those that are not the default, and those of the axes; JSON terms."""


class SweepRecord(BaseModel):
    """The sweep that was begun last in a folder."""

    format: int = _FORMAT
    verb: str
    grid: str
    """Digest of the grid: the file of this name in `grids/` holds it."""
    axes: tuple[str, ...]
    cells: tuple[CellRecord, ...]


def record_of(grid: Grid, cells: tuple[Cell, ...]) -> SweepRecord:
    """Return the content of `sweep.json` for these cells."""
    rows = tuple(CellRecord(id=cell.id, point=cell.point, settings=cell.given()) for cell in cells)
    return SweepRecord(verb=grid.verb, grid=grid.id, axes=tuple(grid.axes), cells=rows)


def is_sweep(folder: Path) -> bool:
    """Return whether a sweep was begun in the folder."""
    return (folder / SWEEP_FILE).is_file()


def read_sweep(folder: Path) -> SweepRecord:
    """Return the record of the sweep in a folder."""
    try:
        content = parse_object((folder / SWEEP_FILE).read_bytes())
        if content.get("format") != _FORMAT:
            raise UserError(f"{folder} was made by another version of Vestige, whose sweeps this one cannot read.")
        return SweepRecord.model_validate(content)
    except FileNotFoundError:
        raise UserError(f"{folder} holds no sweep. Give the folder that `vestige sweep` got as --out.") from None
    except ValueError as error:
        raise CorruptFile(f"{folder / SWEEP_FILE} does not read ({error}). Run the same command again.") from None


TABLE_FILE, JSON_FILE, LINKS = "cells.parquet", "cells.json", "named"
SHOWN_CELLS, SHOWN_FIGURES, SHOWN_FAILURES = 40, 4, 5
"""What fits on a screen; the files hold everything."""
_TEXT_WIDTH = 160
_OF_THE_MACHINE = ("seconds", "peak_memory_bytes")
_STATES = ("done", "running", "failed", "missing")


@dataclass(frozen=True)
class CellRow:
    """A cell, its state and its figures."""

    cell: str
    state: str
    """done, running, failed or missing."""
    folder: str
    """What the command got as --out."""
    point: dict[str, Any]
    """The cell's values along the axes."""
    settings: dict[str, Any]
    figures: dict[str, Any]
    """Numbers that the command left, by name; empty unless the cell is done."""
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
        """Return the number of cells in each state that occurs."""
        counted = Counter(row.state for row in self.rows)
        return {state: counted[state] for state in _STATES if counted[state]}

    def __getitem__(self, point: dict[str, Any]) -> CellRow:
        """Return the first cell with these values along the axes."""
        return next(row for row in self.rows if point.items() <= row.point.items())

    def to_dict(self) -> dict[str, Any]:
        """Return everything in JSON terms."""
        cells = [asdict(row) for row in self.rows]
        return {"verb": self.verb, "grid": self.grid, "axes": list(self.axes), "cells": cells}

    def __str__(self) -> str:
        return as_text(self, _TEXT_WIDTH, soft_wrap=True)

    def __rich__(self) -> "Group":
        from rich.console import Group
        from rich.text import Text

        states = ", ".join(f"{count:,} {state}" for state, count in self.counts().items())
        title = f"{self.out}: sweep of `vestige {self.verb}`, {len(self.rows):,} cells: {states}"
        more = len(self.rows) - SHOWN_CELLS
        after = [f"... and {more:,} more cells: {self.out / TABLE_FILE} holds all."] if more > 0 else []
        failed = [row for row in self.rows if row.state == "failed"]
        after += [f"failed  {row.error}" for row in failed[:SHOWN_FAILURES]]
        after += [f"... and {len(failed) - SHOWN_FAILURES} more failed."] if len(failed) > SHOWN_FAILURES else []
        return Group(Text(title), _screen_table(self), *map(Text, after))


def sweep_report(folder: Path) -> SweepReport:
    """Return how far the sweep in a folder is, by the markers of its cells.

    Raises:
        UserError: No sweep was begun there.
    """
    job = next((job for job in job_statuses(folder) if job.name == JOB), None)
    return report_of(folder, read_sweep(folder), job)


def _summarise(folder: Path) -> Summary:
    counts = sweep_report(folder).counts()
    waiting = ", ".join(f"{count:,} cells {state}" for state, count in counts.items() if state != "done")
    return Summary(f"{sum(counts.values()):,} cells", method=read_sweep(folder).verb, lacking=waiting)


kind = Kind(
    name="sweep", matches=is_sweep, summarise=_summarise, describe=lambda folder: str(sweep_report(folder)), nests=True
)


def report_of(folder: Path, record: SweepRecord, job: JobStatus | None = None) -> SweepReport:
    """Return which cells of a record are done in a folder, which need not exist, or at work by the status of a job."""
    errors = {failure.piece: failure.error for failure in job.failures} if job else {}
    running = set(job.running) if job else set()
    rows = []
    for number, cell in enumerate(record.cells):
        home, error = folder / "cells" / cell.id, errors.get(number, "")
        done, log = read_done(home, cell.id), home / LOG_FILE
        row = CellRow(
            cell=cell.id,
            state="done" if done else "running" if number in running else "failed" if error else "missing",
            folder=str(home / "out"),
            point=cell.point,
            settings=cell.settings,
            figures=done.figures if done else {},
            seconds=done.seconds if done else None,
            error="" if done else error,
            log=str(log) if log.exists() else "",
        )
        rows.append(row)
    return SweepReport(folder, record.verb, record.grid, record.axes, tuple(rows))


def write_tables(report: SweepReport) -> SweepReport:
    """Write the report as `cells.json` and `cells.parquet`, link each result in `named/`, and return the report."""
    from vestige.tables import write_table

    _link_results(report)
    write_json(report.out / JSON_FILE, report.to_dict())
    write_table(report.out / TABLE_FILE, _columns(report))
    return report


def _link_results(report: SweepReport) -> None:
    """Link `named/NAME` to the result of each finished cell; on a disk without links there are none."""
    make_folder(report.out / LINKS)
    taken: set[str] = set()
    for row in report.rows:
        if row.state != "done":
            continue
        name = name_of(row.point)
        name = f"{name}.{row.cell}" if name in taken else name
        taken.add(name)
        path, target = report.out / LINKS / name, Path("..") / "cells" / row.cell / "out"
        with contextlib.suppress(OSError):
            if not path.is_symlink() or Path(os.readlink(path)) != target:
                # Renamed into place: a reader finds the old link or the new one.
                temporary = temporary_path(path)
                temporary.symlink_to(target)
                temporary.replace(path)


def _screen_table(report: SweepReport) -> "Table":
    from rich.table import Table

    shown = report.rows[:SHOWN_CELLS]
    figures = _differing([row.figures for row in shown])[:SHOWN_FIGURES]
    table = Table()
    for column in ("cell", *report.axes, "state", "time", *figures):
        table.add_column(column, overflow="fold")
    for row in shown:
        took = "" if row.seconds is None else format_seconds(row.seconds)
        values = [_show(row.point.get(axis)) for axis in report.axes]
        table.add_row(row.cell, *values, row.state, took, *(_show(row.figures.get(name)) for name in figures))
    return table


def _differing(figures: list[dict[str, Any]]) -> list[str]:
    """Return the names of figures that are not the same in all cells, nor about the machine."""
    names = dict.fromkeys(name for each in figures for name in each)
    held = {name: {each[name] for each in figures if name in each} for name in names}
    return [name for name, values in held.items() if name not in _OF_THE_MACHINE and len(values) > 1]


def _show(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _columns(report: SweepReport) -> Any:
    """Return a pyarrow table: state, seconds and so on, then `settings.*`, then `figures.*`."""
    import pyarrow as arrow

    plain = ("cell", "state", "seconds", "folder", "error", "log")
    columns: dict[str, list[Any]] = {name: [getattr(row, name) for row in report.rows] for name in plain}
    settings = [row.settings | row.point for row in report.rows]
    for kind, held in (("settings", settings), ("figures", [row.figures for row in report.rows])):
        for name in dict.fromkeys(name for row in held for name in row):
            columns[f"{kind}.{name}"] = _column([row.get(name) for row in held])
    types = {"seconds": arrow.float64()}
    return arrow.table({name: arrow.array(values, types.get(name)) for name, values in columns.items()})


def _column(values: list[Any]) -> list[Any]:
    """Return values of one type: numbers as numbers, anything mixed or nested as JSON text."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float}:
        return [None if value is None else float(value) for value in values] if float in kinds else values
    return values if kinds in ({str}, {bool}) else [None if value is None else json.dumps(value) for value in values]
