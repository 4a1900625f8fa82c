"""What the verbs take that read an index or a run: report, view, status, export."""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from vestige.settings._base import Settings


class ReportSettings(Settings):
    """What `vestige report` takes."""

    positional: ClassVar[tuple[str, ...]] = ("run",)
    run: Path = Field(description="Folder of a run made by `vestige attribute`.")
    out: Path | None = Field(None, description="The HTML file to write. Not given: report.html in the run.")


class ViewSettings(Settings):
    """What `vestige view` takes."""

    positional: ClassVar[tuple[str, ...]] = ("run",)
    run: Path = Field(description="Folder of a run made by `vestige attribute`.")
    port: int = Field(0, ge=0, le=65535, description="Port on this computer; 0 takes a free one.")


class StatusSettings(Settings):
    """What `vestige status` takes."""

    positional: ClassVar[tuple[str, ...]] = ("path",)
    path: Path = Field(description="Folder of an index or of a run.")


class ExportSettings(Settings):
    """What `vestige export` takes."""

    positional: ClassVar[tuple[str, ...]] = ("path",)
    path: Path = Field(description="Folder of an index.")
    out: Path = Field(description="Folder to write into, new or empty.")
    to: Literal["numpy", "arrow", "parquet"] = Field("numpy", description="Format to export to.")
