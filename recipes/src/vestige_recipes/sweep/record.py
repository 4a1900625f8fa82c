"""`sweep.json`: which cells the folder of a sweep is to hold, so that any process can say which of them are done."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from vestige.errors import CorruptFile, UserError
from vestige.parsing import parse_object
from vestige_recipes.sweep.cell_files import write_json
from vestige_recipes.sweep.cells import Cell
from vestige_recipes.sweep.grid import ID_DIGITS, Grid

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


def write_sweep(folder: Path, grid: Grid, cells: tuple[Cell, ...]) -> None:
    """Make the folder that of this sweep; cells of earlier grids stay in it."""
    write_json(folder / SWEEP_FILE, record_of(grid, cells).model_dump())


def is_sweep(folder: Path) -> bool:
    """Return whether a sweep was begun in the folder."""
    return (folder / SWEEP_FILE).is_file()


def read_sweep(folder: Path) -> SweepRecord:
    """Return the record of the sweep in a folder.

    Raises:
        UserError: There is none, or it is of a later version.
        CorruptFile: Its record cannot be read.
    """
    try:
        content = parse_object((folder / SWEEP_FILE).read_bytes())
        if content.get("format") != _FORMAT:
            raise UserError(f"{folder} was made by another version of Vestige, whose sweeps this one cannot read.")
        return SweepRecord.model_validate(content)
    except FileNotFoundError:
        raise UserError(f"{folder} holds no sweep. Give the folder that `vestige sweep` got as --out.") from None
    except ValueError as error:
        raise CorruptFile(f"{folder / SWEEP_FILE} does not read ({error}). Run the same command again.") from None
