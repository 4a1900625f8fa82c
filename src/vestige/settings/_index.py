"""What `vestige index` and `vestige doctor` take."""

import re
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from vestige.settings._shared import CompressionSettings, ReadingSettings

_SHARD = re.compile(r"(\d+)/(\d+)")


class IndexSettings(ReadingSettings, CompressionSettings):
    """What `vestige index` takes."""

    model: Any = Field(description="The model: hub id, local folder, GGUF folder or PEFT adapter folder.")
    data: Any = Field(description="The training data: JSONL, JSON, CSV, Parquet, `datasets` folder or hub id.")
    out: Path = Field(description="Folder of the index; an interrupted run continues in it.")
    shard: str | None = Field(None, description="Compute only part i of n of the shards, written i/n, from 1/n to n/n.")
    append: bool = Field(False, description="Add the rows that the data gained since; old shards stay untouched.")
    overwrite: bool = Field(False, description="Delete an index that is already there instead of continuing it.")

    @field_validator("shard")
    @classmethod
    def _shard_is_a_part(cls, shard: str | None) -> str | None:
        match = None if shard is None else _SHARD.fullmatch(shard)
        if shard is not None and (match is None or not 1 <= int(match[1]) <= int(match[2])):
            raise ValueError("i/n with i from 1 to n, such as 1/4")
        return shard

    @property
    def part(self) -> tuple[int, int] | None:
        """`shard` as (zero-based part, number of parts)."""
        if self.shard is None:
            return None
        number, parts = self.shard.split("/")
        return int(number) - 1, int(parts)


class DoctorSettings(ReadingSettings, CompressionSettings):
    """What `vestige doctor` takes."""

    model: Any = Field(description="The model: hub id, local folder, GGUF folder or PEFT adapter folder.")
    data: Any = Field(description="The training data: JSONL, JSON, CSV, Parquet, `datasets` folder or hub id.")
