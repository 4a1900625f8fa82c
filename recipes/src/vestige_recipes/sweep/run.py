"""Run one command over a grid of settings: the cells are the pieces of a job, and its reduce writes the table."""

import gc
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vestige.errors import DiskSpaceError, PieceFailed, SpecError, UserError, VestigeError
from vestige.jobs import (
    Compute,
    Pieces,
    is_worker,
    job_statuses,
    note_kept,
    own_jobs,
    run_pieces,
    step_done,
    worker_command,
)
from vestige.progress import announce
from vestige.registry import Command
from vestige.runs import is_complete
from vestige.settings import LaunchSettings, Settings, with_settings
from vestige.storage import is_temporary, make_folder, remove_strays, require_no_others
from vestige_recipes.commands import SweepSettings
from vestige_recipes.sweep.cell_files import (
    LOG_FILE,
    figures_of,
    fingerprints,
    log_output,
    read_done,
    require_unchanged,
    write_cell,
    write_done,
    write_json,
)
from vestige_recipes.sweep.cells import ID_DIGITS, Cell, Grid, cells_of
from vestige_recipes.sweep.published import read_grid
from vestige_recipes.sweep.report import (
    GRIDS,
    JOB,
    SWEEP_FILE,
    SweepReport,
    is_sweep,
    read_sweep,
    record_of,
    report_of,
    sweep_report,
    write_tables,
)


@with_settings(SweepSettings)
def sweep(settings: SweepSettings) -> SweepReport:
    """Run a command over a grid of settings, each run in a folder named after its settings, and return the table.

    Every cell is checked before the first one runs; a finished cell is not run again. A cell that fails is tried again
    and then reported with its log, while the others go on. Interrupted at any moment, the same call continues; a grown
    grid keeps what it had.

    Raises:
        SpecError: The grid, or a cell of it, is not what the command takes; nothing was run.
        IndexMismatch: Data or models changed since cells were finished; nothing was changed.
        PieceFailed: Cells failed every time they were tried; all others are done.
    """
    grid = read_grid(settings.grid)
    cells = cells_of(grid, settings.out)
    if settings.dry_run:
        return report_of(settings.out, record_of(grid, cells))
    _require_processors(settings, cells)
    if not is_worker():
        _prepare(settings.out, grid, cells)
    # Workers read the grid as it was when the sweep began, even if the file changes.
    frozen = settings.out / GRIDS / f"{grid.id}.json"
    command = worker_command(settings.model_copy(update={"grid": str(frozen)}), "sweep")
    try:
        return run_pieces(_pieces(settings.out, cells), settings, command)
    except PieceFailed:
        if not is_worker():
            write_tables(sweep_report(settings.out))
        raise


class CellFailed(VestigeError):
    """The command of a cell ended with an error; the other cells go on."""


def _pieces(out: Path, cells: tuple[Cell, ...]) -> Pieces[SweepReport]:
    """Return the cells of a grid as pieces of work, and the table of their results as what they become."""
    return Pieces(
        name=JOB,
        unit="cells",
        folder=out,
        weights=[1] * len(cells),
        is_done=lambda piece: read_done(cells[piece].folder, cells[piece].id) is not None,
        open=lambda: _run_cells(cells),
        reduce=lambda: write_tables(sweep_report(out)),
    )


@contextmanager
def _run_cells(cells: tuple[Cell, ...]) -> Iterator[Compute]:
    """Yield the function that runs a cell."""
    hopeless: dict[int, CellFailed] = {}

    def compute(piece: int) -> None:
        # A second attempt in this process cannot change what the user has to fix.
        if piece in hopeless:
            raise hopeless[piece]
        cell = cells[piece]
        try:
            run_cell(cell)
        except DiskSpaceError:
            # It would end every other cell too.
            raise
        except Exception as error:
            log = cell.folder / LOG_FILE
            failed = CellFailed(f"{cell.shown}: {type(error).__name__}: {error}\n    log of the cell: {log}")
            if isinstance(error, UserError):
                hopeless[piece] = failed
            raise failed from error
        finally:
            _free_memory()

    yield compute


def run_cell(cell: Cell) -> None:
    """Run the command of a cell with what it prints in the cell's log, then mark the cell as done."""
    write_cell(cell)
    inputs, before = fingerprints(cell.matters()), _files_in(cell.out)
    started = time.perf_counter()
    try:
        with log_output(cell), own_jobs():
            cell.command.call(allow_resume(cell.command, cell.settings))
    except BaseException as error:
        if not isinstance(error, Exception) and _files_in(cell.out) - before:
            note_kept()
        if isinstance(error, SystemExit):
            # The request to stop is meant for this job too: `step_done` stops it.
            step_done()
            raise CellFailed(f"it ended with status {error.code}") from error
        raise
    write_done(cell, time.perf_counter() - started, inputs, figures_of(cell.out))


def allow_resume(command: Command, settings: Settings) -> Settings:
    """Return settings that also work after a kill between the end of the command and the cell's marker.

    A command that writes its run in one step at the end refuses to replace one; here it can only be the same run, of
    which the last file may be missing.
    """
    finished = command.writes_once and is_complete(settings.arguments()["out"])
    return settings.model_copy(update={"overwrite": True}) if finished else settings


def _prepare(out: Path, grid: Grid, cells: tuple[Cell, ...]) -> None:
    if not is_sweep(out):
        require_no_others(out, [f"{GRIDS}/{'[0-9a-f]' * ID_DIGITS}.json"])
    require_unchanged(cells)
    before = read_sweep(out).grid if is_sweep(out) else None
    running = any(job.name == JOB and job.state == "running" for job in job_statuses(out))
    # Cells are claimed by number, the same in every grid.
    if before not in (None, grid.id) and running:
        raise UserError(
            f"Another grid is being run in {out}. Wait for it (`vestige status {out}`), end it (`vestige cancel "
            f"{out}`), or give another --out."
        )
    make_folder(out / GRIDS)
    remove_strays(out)
    write_json(out / GRIDS / f"{grid.id}.json", grid.to_dict())
    write_json(out / SWEEP_FILE, record_of(grid, cells).model_dump())
    announce(f"Sweep of `vestige {grid.verb}`: {len(cells):,} cells in {out}.")


def _require_processors(settings: SweepSettings, cells: tuple[Cell, ...]) -> None:
    """Raise if cells, which may have workers of their own, need more than the sweep's processes have."""
    if settings.engine == "local" and settings.workers == 1:
        return
    launched = [(cell, cell.settings) for cell in cells if isinstance(cell.settings, LaunchSettings)]
    for cell, inner in launched:
        if inner.engine != "local":
            raise SpecError(
                f"{cell.shown} has `engine: {inner.engine}`, and so the sweep must be one process: it submits the "
                "cells' jobs, one cell after the other. Drop --workers and --engine of the sweep, or `engine` of the "
                "cells."
            )
        needed = inner.workers * inner.threads
        if settings.engine != "local" and inner.workers > 1 and needed > settings.threads:
            raise SpecError(
                f"{cell.shown} has {inner.workers} workers of {inner.threads} threads, and a job of the sweep has "
                f"{settings.threads} processors. Give the sweep --threads {needed}, or drop `workers` of the cells."
            )
    most = max((inner.workers for _, inner in launched), default=1)
    if settings.workers > 1 and most > 1 and not is_worker():
        announce(
            f"{settings.workers} cells at once with up to {most} workers each: {settings.workers * most} processes."
        )


def _files_in(folder: Path) -> set[str]:
    """Return the results of the cell so far, without what jobs note about themselves."""
    files = (path for path in folder.rglob("*") if path.is_file() and not is_temporary(path))
    return {str(path) for path in files if "launch" not in path.relative_to(folder).parts}


def _free_memory() -> None:
    """Free the memory of the last cell's model for the next one."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
