"""`vestige sweep`: one verb over a grid of settings."""

from pathlib import Path

from vestige.errors import PieceFailed, SpecError, UserError
from vestige.files import make_folder, remove_strays
from vestige.folders import require_no_others
from vestige.launch import is_worker, job_statuses, run_plan, worker_command
from vestige.progress import announce
from vestige.settings import LaunchSettings, SweepSettings, verb
from vestige.sweep._cells import ID_DIGITS, Cells, cells_of
from vestige.sweep._files import require_unchanged, write_json
from vestige.sweep._grid import Grid, read_grid
from vestige.sweep._plan import SweepPlan
from vestige.sweep._record import GRIDS, SWEEP, grid_id, is_sweep, read_sweep, write_sweep
from vestige.sweep._report import SweepReport, planned_report, sweep_report, write_tables


@verb(SweepSettings)
def sweep(settings: SweepSettings) -> SweepReport:
    """The table of a grid of runs, each in a folder named after its settings; what is done already is not done again.

    Every cell is checked before the first one runs. A cell that fails is tried again and then reported with its log,
    while the others go on. Interrupted at any moment, the same call continues; a grown grid keeps what it had.

    Raises:
        SpecError: The grid, or a cell of it, is not what the verb takes; nothing was run.
        IndexMismatch: Data or models changed since cells were finished; nothing was changed.
        PieceFailed: Cells failed every time they were tried; all others are done.
    """
    grid = read_grid(settings.grid)
    cells = cells_of(grid, settings.out)
    if settings.dry_run:
        return planned_report(settings.out, grid, cells)
    _require_room_for_jobs(settings, cells)
    if not is_worker():
        _prepare(settings, grid, cells)
    frozen = settings.out / GRIDS / f"{grid_id(grid)}.json"
    # Workers read the grid as it was when the sweep began, whatever becomes of the file.
    command = worker_command(settings.model_copy(update={"grid": str(frozen)}), "sweep")
    try:
        return run_plan(SweepPlan(settings.out, cells), settings, command)
    except PieceFailed:
        if not is_worker():
            write_tables(sweep_report(settings.out))
        raise


def _prepare(settings: SweepSettings, grid: Grid, cells: Cells) -> None:
    if not is_sweep(settings.out):
        require_no_others(settings.out, [f"{GRIDS}/{'[0-9a-f]' * ID_DIGITS}.json"])
    require_unchanged(cells.cells)
    _require_no_other_sweep(settings.out, grid)
    make_folder(settings.out / GRIDS)
    remove_strays(settings.out)
    write_json(settings.out / GRIDS / f"{grid_id(grid)}.json", grid.to_dict())
    write_sweep(settings.out, grid, cells)
    announce(f"Sweep of `vestige {grid.verb}`: {len(cells.cells):,} cells in {settings.out}.")


def _require_room_for_jobs(settings: SweepSettings, cells: Cells) -> None:
    """A cell may have workers of its own, which run where the cell does.

    Raises:
        SpecError: Cells would submit jobs from within jobs, which may never begin, or start more processes in a batch
            job than it has processors.
    """
    several = settings.engine == "slurm" or settings.workers > 1
    for cell in cells.cells:
        inner = cell.settings
        if not several or not isinstance(inner, LaunchSettings):
            continue
        if inner.engine == "slurm":
            raise SpecError(
                f"{cell.shown} has `engine: slurm`, and so the sweep must be one process: it submits the cells' jobs, "
                "one cell after the other. Drop --workers and --engine of the sweep, or `engine` of the cells."
            )
        needed = inner.workers * inner.threads
        if settings.engine == "slurm" and inner.workers > 1 and needed > settings.threads:
            raise SpecError(
                f"{cell.shown} has {inner.workers} workers of {inner.threads} threads, and a job of the sweep has "
                f"{settings.threads} processors. Give the sweep --threads {needed}, or drop `workers` of the cells."
            )
    most = max((each.settings.workers for each in cells.cells if isinstance(each.settings, LaunchSettings)), default=1)
    if settings.workers > 1 and most > 1 and not is_worker():
        announce(
            f"{settings.workers} cells at once with up to {most} workers each: {settings.workers * most} processes."
        )


def _require_no_other_sweep(out: Path, grid: Grid) -> None:
    """Cells are claimed by their numbers, which mean something in one grid only."""
    before = read_sweep(out).grid if is_sweep(out) else None
    running = any(job.name == SWEEP and job.state == "running" for job in job_statuses(out))
    if before not in (None, grid_id(grid)) and running:
        raise UserError(
            f"Another grid is being run in {out}. Wait for it (`vestige status {out}`), end it (`vestige cancel "
            f"{out}`), or give another --out."
        )
