"""Sweeps: one command over a grid of settings, each run in a folder that is named after its settings."""

from vestige_recipes.sweep.cells import Grid as Grid
from vestige_recipes.sweep.published import (
    PublishedSweep as PublishedSweep,
    read_grid as read_grid,
    read_published as read_published,
)
from vestige_recipes.sweep.report import SweepReport as SweepReport, sweep_report as sweep_report
from vestige_recipes.sweep.run import sweep as sweep
