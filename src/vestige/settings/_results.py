"""What the commands take that read an index or a run: report, view, status, export, import."""

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, PositiveInt

from vestige.settings._base import BAD_TEXT, OnBadText, Settings

IndexFormat = Literal["numpy", "arrow", "parquet", "safetensors", "datasets", "lance", "faiss", "projections", "chunks"]
RunFormat = Literal["csv", "json", "datasets", "similarities"]
ExportFormat = Literal[IndexFormat, RunFormat]
ImportLayout = Literal["auto", "projections", "fullgrads", "chunks", "similarities"]


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


class MethodsSettings(Settings):
    """The settings of `vestige methods`."""

    positional: ClassVar[tuple[str, ...]] = ("name",)
    name: str | None = Field(None, description="A method, to print everything about it. Not given: list all.")


class ExportSettings(Settings):
    """What `vestige export` takes."""

    positional: ClassVar[tuple[str, ...]] = ("path",)
    path: Path = Field(description="Folder of an index or of a run.")
    out: Path = Field(description="Folder to write into, new or empty.")
    to: ExportFormat = Field(
        "numpy",
        description="Format: of an index numpy, arrow, parquet, safetensors, datasets, lance, faiss, projections or "
        "chunks; of a run csv, json, datasets or similarities.",
    )


class ImportSettings(Settings):
    """What `vestige import` takes."""

    positional: ClassVar[tuple[str, ...]] = ("source",)
    source: Path = Field(description="Folder or file in a published layout.")
    out: Path = Field(description="Folder of the index, or of the run for similarities and with --against.")
    layout: ImportLayout = Field(
        "auto",
        description="The layout: projections (proj_iter_*.pt), fullgrads (fullgrad_iter_*.pt), chunks "
        "(chunk_gradients_*.mmap) or similarities (JSON); auto finds it from the files.",
    )
    data: Any = Field(
        None,
        description="The training data: its row i is row i of the files, and the lengths must agree; for "
        "similarities, texts by `id`.",
    )
    queries: Any = Field(None, description="Similarities: the texts of the queries, by `id`.")
    on_bad_text: OnBadText = Field("refuse", description=BAD_TEXT)
    model: Any = Field(None, description="The model that the gradients are of; layers are looked up in it.")
    against: Path | None = Field(
        None, description="Rows of the files are queries: score the rows of this index, of equal layout, for them."
    )
    method: Literal["grad-dot", "grad-cos"] = Field(
        "grad-dot", description="With --against: inner products, or cosines."
    )
    dimension: PositiveInt | None = Field(
        None, description="Similarities of random projections: which dimension, where the file has several."
    )
    k: PositiveInt = Field(20, description="For a run: proponents, and as many opponents, to keep for each query.")
    overwrite: bool = Field(False, description="Replace an index or a run that is already in the folder.")
