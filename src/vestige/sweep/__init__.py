"""Sweeps: one verb over a grid of settings, in folders named after what is in them."""

from vestige.sweep._grid import Grid as Grid
from vestige.sweep._grid import read_grid as read_grid
from vestige.sweep._published import PublishedSweep as PublishedSweep
from vestige.sweep._published import read_published as read_published
from vestige.sweep._record import is_sweep as is_sweep
from vestige.sweep._report import SweepReport as SweepReport
from vestige.sweep._report import sweep_report as sweep_report
from vestige.sweep._report import sweep_status as sweep_status
from vestige.sweep._sweep import sweep as sweep
