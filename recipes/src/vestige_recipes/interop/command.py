"""`vestige import`: its settings and the command; imported on every start, so nothing here imports torch."""

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, PositiveInt

from vestige.registry import command
from vestige.settings import BAD_TEXT, OnBadText, Settings
from vestige.terminal import say

ImportLayout = Literal["auto", "projections", "fullgrads", "chunks", "similarities"]


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


@command("import", ImportSettings, function="vestige_recipes.interop:import_published", order=190)
def import_command(settings: ImportSettings) -> None:
    """Turn gradients or scores that other software has published into an index or a run."""
    say(import_command.call(settings).folder)
