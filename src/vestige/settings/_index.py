"""What `vestige index` and `vestige doctor` take."""

from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from vestige.settings._shared import CompressionSettings, LaunchSettings, ReadingSettings


class IndexSettings(ReadingSettings, CompressionSettings, LaunchSettings):
    """What `vestige index` takes."""

    runs_sharded: ClassVar[bool] = True

    model: Any = Field(description="The model: hub id, local folder, GGUF folder or PEFT adapter folder.")
    data: Any = Field(
        description="The training data: JSONL, JSON, CSV, Parquet: a file, or several (a folder, 'parts/*.jsonl'); a "
        "`datasets` folder or a hub id."
    )
    out: Path = Field(description="Folder of the index; an interrupted run continues in it.")
    append: bool = Field(False, description="Add the rows that the data gained since; old shards stay untouched.")
    skip_bad: bool = Field(
        False, description="Leave out, and list, examples whose loss or gradient is NaN or infinite, instead of ending."
    )
    profile: bool = Field(False, description="Measure where the time goes: a table, and profile.json with the index.")
    overwrite: bool = Field(False, description="Delete an index that is already there instead of continuing it.")


class DoctorSettings(ReadingSettings, CompressionSettings):
    """What `vestige doctor` takes."""

    model: Any = Field(description="The model: hub id, local folder, GGUF folder or PEFT adapter folder.")
    data: Any = Field(
        description="The training data: JSONL, JSON, CSV, Parquet: a file, or several (a folder, 'parts/*.jsonl'); a "
        "`datasets` folder or a hub id."
    )
