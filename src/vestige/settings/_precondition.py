"""What `vestige precondition` takes."""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, PositiveFloat

from vestige.settings._shared import LaunchSettings


class PreconditionSettings(LaunchSettings):
    """What `vestige precondition` takes."""

    positional: ClassVar[tuple[str, ...]] = ("index",)
    index: Path = Field(description="Folder of an index made by `vestige index`.")
    damping: PositiveFloat = Field(1.0, description="Damping of the inverse, relative to the mean eigenvalue.")
    out: Path | None = Field(
        None, description="Folder for the preconditioned gradient of every example. Not given: the curvature alone."
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Number format of what goes to --out.")
    profile: bool = Field(False, description="Measure where the time goes: a table, and profile.json with the result.")
