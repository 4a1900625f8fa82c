"""What every row of `vestige data` takes: where rows come from and where they go."""

from pathlib import Path
from typing import Any

from pydantic import Field, PositiveInt

from vestige.settings._base import BAD_TEXT, OnBadText, Settings


class PreparationSettings(Settings):
    """Rows in, rows out."""

    data: Any = Field(description="The rows: any data file, folder or hub id that Vestige reads.")
    out: Path = Field(description="Folder of the result: data.jsonl, the same as a `datasets` folder, and a record.")
    limit: PositiveInt | None = Field(None, description="Use only so many rows, the first ones.")
    on_bad_text: OnBadText = Field("refuse", description=BAD_TEXT)
    push_to_hub: str | None = Field(None, description="Also upload the result to the hub, as owner/name.")
    private: bool = Field(True, description="With --push-to-hub: only its owner sees it.")
    overwrite: bool = Field(
        False, description="Replace a result that other settings made. Replies that were paid for stay."
    )
