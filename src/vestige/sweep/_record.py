"""`sweep.json`: which cells the folder of a sweep is to hold, so that anyone can say which of them are there."""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from vestige.errors import CorruptFile, UserError
from vestige.parsing import as_record, parse_object
from vestige.sweep._cells import ID_DIGITS, Cells
from vestige.sweep._files import write_json
from vestige.sweep._grid import Grid

SWEEP = "Sweep"
"""Name of the plan, under which its job is found."""
SWEEP_FILE, GRIDS = "sweep.json", "grids"
_FORMAT = 1


class CellRecord(NamedTuple):
    """A cell as the sweep's record names it."""

    id: Annotated[str, Field(pattern=f"^[0-9a-f]{{{ID_DIGITS}}}$")]
    point: dict[str, Any]
    settings: dict[str, Any]
    """Those that are not as by default, and those of the axes; JSON terms."""


class SweepRecord(NamedTuple):
    """The sweep that was begun last in a folder."""

    verb: str
    grid: str
    """Digest of the grid: the file of this name in `grids/` holds it."""
    axes: tuple[str, ...]
    cells: tuple[CellRecord, ...]


def grid_id(grid: Grid) -> str:
    """Sixteen hexadecimal digits that tell this grid from others, order of cells included."""
    content = json.dumps(grid.to_dict(), ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()[:ID_DIGITS]


def record_of(grid: Grid, cells: Cells) -> SweepRecord:
    """What `sweep.json` says of these cells."""
    rows = tuple(CellRecord(cell.id, cell.point, _given(cell.matters(), cells, cell.point)) for cell in cells.cells)
    return SweepRecord(grid.verb, grid_id(grid), tuple(grid.axes), rows)


def write_sweep(folder: Path, grid: Grid, cells: Cells) -> None:
    """The folder is that of this sweep; cells of earlier grids stay in it."""
    record = record_of(grid, cells)
    rows = [cell._asdict() for cell in record.cells]
    write_json(folder / SWEEP_FILE, {"format": _FORMAT, **record._asdict(), "cells": rows})


def is_sweep(folder: Path) -> bool:
    """Whether a sweep was begun in the folder."""
    return (folder / SWEEP_FILE).is_file()


def read_sweep(folder: Path) -> SweepRecord:
    """The sweep in a folder.

    Raises:
        UserError: There is none, or it is of a later version.
        CorruptFile: Its record does not read.
    """
    try:
        content = parse_object((folder / SWEEP_FILE).read_bytes())
        if content.pop("format") != _FORMAT:
            raise UserError(f"{folder} was made by another version of Vestige, whose sweeps this one cannot read.")
        return as_record(SweepRecord, content)
    except FileNotFoundError:
        raise UserError(f"{folder} holds no sweep. Give the folder that `vestige sweep` got as --out.") from None
    except (ValueError, KeyError) as error:
        raise CorruptFile(f"{folder / SWEEP_FILE} does not read ({error}). Run the same command again.") from None


def _given(settings: dict[str, Any], cells: Cells, point: dict[str, Any]) -> dict[str, Any]:
    fields = cells.command.settings.model_fields
    axes = {name.partition(".")[0] for name in point}
    return {name: value for name, value in settings.items() if name in axes or value != fields[name].default}
