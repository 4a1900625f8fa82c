"""What `vestige sweep` takes."""

from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from vestige.settings._launch import LaunchSettings


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
