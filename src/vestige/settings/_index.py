"""What `vestige index` and `vestige doctor` take."""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, PositiveFloat

from vestige.settings._base import Common
from vestige.settings._shared import (
    CompressionSettings,
    DataName,
    IndexFolder,
    LaunchSettings,
    ModelName,
    ReadingSettings,
)


class PreconditionSettings(LaunchSettings):
    """What `vestige precondition` takes."""

    positional: ClassVar[tuple[str, ...]] = ("index",)
    index: IndexFolder[Path] = Field(description="Folder of an index made by `vestige index`.")
    damping: Common[PositiveFloat] = Field(1.0, description="Damping of the inverse, relative to the mean eigenvalue.")
    out: Common[Path | None] = Field(
        None, description="Folder for the preconditioned gradient of every example. Not given: the curvature alone."
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Number format of what goes to --out.")
    profile: bool = Field(False, description="Measure where the time goes: a table, and profile.json with the result.")


class IndexSettings(ReadingSettings, CompressionSettings, LaunchSettings):
    """What `vestige index` takes."""

    positional: ClassVar[tuple[str, ...]] = ("model", "data")
    runs_sharded: ClassVar[bool] = True

    model: ModelName = Field(description="The model: hub id, local folder, GGUF folder or PEFT adapter folder.")
    data: DataName = Field(
        description="The training data: JSONL, JSON, CSV, Parquet: a file, or several (a folder, 'parts/*.jsonl'); a "
        "`datasets` folder or a hub id."
    )
    out: Common[Path] = Field(description="Folder of the index; an interrupted run continues in it.")
    append: Common[bool] = Field(
        False, description="Add the rows that the data gained since; old shards stay untouched."
    )
    skip_bad: bool = Field(
        False, description="Leave out, and list, examples whose loss or gradient is NaN or infinite, instead of ending."
    )
    profile: bool = Field(False, description="Measure where the time goes: a table, and profile.json with the index.")
    overwrite: bool = Field(False, description="Delete an index that is already there instead of continuing it.")


class DoctorSettings(ReadingSettings, CompressionSettings):
    """What `vestige doctor` takes."""

    model: ModelName = Field(description="The model: hub id, local folder, GGUF folder or PEFT adapter folder.")
    data: DataName = Field(
        description="The training data: JSONL, JSON, CSV, Parquet: a file, or several (a folder, 'parts/*.jsonl'); a "
        "`datasets` folder or a hub id."
    )
