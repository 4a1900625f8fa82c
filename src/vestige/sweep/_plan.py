"""A sweep as a work plan: its cells are the pieces, and the reduce writes the table."""

import gc
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from vestige.errors import DiskSpaceError, UserError, VestigeError
from vestige.files import is_temporary
from vestige.launch import Compute, note_kept, own_jobs, step_done
from vestige.registry import Command
from vestige.settings import Settings
from vestige.sweep._cells import Cell, Cells
from vestige.sweep._figures import figures_of
from vestige.sweep._files import LOG_FILE, Done, logged, read_done, write_cell, write_done
from vestige.sweep._inputs import fingerprints
from vestige.sweep._record import SWEEP
from vestige.sweep._report import SweepReport, sweep_report, write_tables

RUN_FILE = "run.json"


class CellFailed(VestigeError):
    """The verb of a cell ended with an error; the other cells go on."""


@dataclass(frozen=True)
class SweepPlan:
    """The cells of a grid, and the table of what came of them."""

    folder: Path
    cells: Cells
    name: str = SWEEP
    unit: str = "cells"

    @property
    def pieces(self) -> int:
        """Number of cells."""
        return len(self.cells.cells)

    def is_done(self, piece: int) -> bool:
        """Whether the cell's marker is there."""
        cell = self.cells.cells[piece]
        return read_done(cell.folder, cell.id) is not None

    def weight(self, piece: int) -> float:  # noqa: ARG002
        """One cell each."""
        return 1.0

    @contextmanager
    def open(self) -> Iterator[Compute]:
        """What runs the verb in a cell."""
        hopeless: dict[int, CellFailed] = {}

        def compute(piece: int) -> None:
            # What the user has to mend, no second attempt in this process can.
            if piece in hopeless:
                raise hopeless[piece]
            cell = self.cells.cells[piece]
            try:
                self._run(cell)
            except DiskSpaceError:
                # It would end every other cell too.
                raise
            except Exception as error:
                failed = _failed(cell, error)
                if isinstance(error, UserError):
                    hopeless[piece] = failed
                raise failed from error
            finally:
                _free()

        yield compute

    def reduce(self) -> SweepReport:
        """The table of all cells, in `cells.parquet` and `cells.json`."""
        return write_tables(sweep_report(self.folder))

    def _run(self, cell: Cell) -> None:
        write_cell(cell, self.cells.command.name)
        inputs, before = fingerprints(cell.matters()), _files_in(cell.out)
        started = time.perf_counter()
        try:
            with logged(cell), own_jobs():
                self.cells.command.call(resumed(self.cells.command, cell.settings))
        except BaseException as error:
            if not isinstance(error, Exception) and _files_in(cell.out) - before:
                note_kept()
            if isinstance(error, SystemExit):
                # A job inside the cell was asked to stop, and so is this one: `step_done` says so.
                step_done()
                raise CellFailed(f"it ended with status {error.code}") from error
            raise
        seconds = time.perf_counter() - started
        write_done(cell, Done(cell.id, seconds, version("vestige"), inputs, figures_of(cell.out)))


def resumed(command: Command, settings: Settings) -> Settings:
    """The settings that also do after a kill between the end of the verb and the cell's marker.

    A verb that writes a run in the end refuses to replace one; here it can only be the same run, perhaps without its
    last file.
    """
    finished = command.writes_once and (settings.arguments()["out"] / RUN_FILE).exists()
    return settings.model_copy(update={"overwrite": True}) if finished else settings


def _failed(cell: Cell, error: Exception) -> CellFailed:
    log = cell.folder / LOG_FILE
    return CellFailed(f"{cell.shown}: {type(error).__name__}: {error}\n    log of the cell: {log}")


def _files_in(folder: Path) -> set[str]:
    """Results of the cell so far, without what jobs note about themselves."""
    files = (path for path in folder.rglob("*") if path.is_file() and not is_temporary(path))
    return {str(path) for path in files if "launch" not in path.relative_to(folder).parts}


def _free() -> None:
    """The memory of the last cell's model is free for the next one's."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
