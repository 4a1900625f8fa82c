"""The settings of the commands that read an index or a run: report, view, status, export, methods."""

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from vestige.settings._base import Settings


class ReportSettings(Settings):
    """What `vestige report` takes."""

    positional: ClassVar[tuple[str, ...]] = ("run",)
    run: Path = Field(
        description="Folder of a run made by `vestige attribute`, `untrac`, `audit` or `evaluate components`."
    )
    out: Path | None = Field(None, description="The HTML file to write. Not given: report.html in the run.")


class ViewSettings(Settings):
    """What `vestige view` takes."""

    positional: ClassVar[tuple[str, ...]] = ("run",)
    run: Path = Field(
        description="Folder of a run made by `vestige attribute`, `untrac`, `audit` or `evaluate components`."
    )
    port: int = Field(0, ge=0, le=65535, description="Port on this computer; 0 takes a free one.")


class StatusSettings(Settings):
    """What `vestige status` takes."""

    positional: ClassVar[tuple[str, ...]] = ("path",)
    path: Path = Field(description="Folder of an index, a run or a sweep, finished or in the making.")
    watch: bool = Field(False, description="Show it again every two seconds, until the work is over or Ctrl-C.")
    verify: bool = Field(
        False, description="Compare every file of an index, a run or an audit with its sha256, and list them."
    )


class CancelSettings(Settings):
    """What `vestige cancel` takes."""

    positional: ClassVar[tuple[str, ...]] = ("path",)
    path: Path = Field(description="Folder of an index, a run or a sweep in the making.")


class MeasuresSettings(Settings):
    """The settings of `vestige measures`."""

    positional: ClassVar[tuple[str, ...]] = ("name",)
    name: str | None = Field(None, description="A measure, to print everything about it. Not given: list all.")


class MethodsSettings(Settings):
    """The settings of `vestige methods`."""

    positional: ClassVar[tuple[str, ...]] = ("name",)
    name: str | None = Field(None, description="A method, to print everything about it. Not given: list all.")


class ExportSettings(Settings):
    """What `vestige export` takes."""

    positional: ClassVar[tuple[str, ...]] = ("path",)
    path: Path = Field(description="Folder of an index or of a run.")
    out: Path = Field(description="Folder to write into, new or empty.")
    to: str = Field("numpy", description="Format: a name from the list above, for what lies at PATH.")
