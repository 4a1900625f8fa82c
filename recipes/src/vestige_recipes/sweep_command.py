"""The command `vestige sweep` and its settings, apart from the package that runs it: help imports nothing else."""

from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from vestige.registry import command
from vestige.settings import LaunchSettings
from vestige.terminal import show


class SweepSettings(LaunchSettings):
    """What `vestige sweep` takes."""

    positional: ClassVar[tuple[str, ...]] = ("grid",)
    grid: Any = Field(
        description="The grid: a YAML or JSON file with verb, base, mode and axes, or a published configuration."
    )
    out: Path = Field(
        description="Folder of the sweep: its cells and cells.parquet. An interrupted sweep goes on there."
    )
    dry_run: bool = Field(False, description="Check every cell and list them; run nothing, write nothing.")


@command(
    "sweep",
    SweepSettings,
    function="vestige_recipes.sweep:sweep",
    order=130,
    status="vestige_recipes.sweep:sweep_status",
)
def sweep(settings: SweepSettings) -> None:
    """Run a command over a grid of settings.

    Every cell is checked before the first one runs. Its folder is named after its settings, so an interrupted sweep
    continues and a grown grid keeps what it had. A cell that fails is reported with its log, and the others go on.
    """
    show(sweep.call(settings), file_width=160)
