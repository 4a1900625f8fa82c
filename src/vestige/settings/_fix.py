"""What `vestige fix` takes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, PositiveInt, model_validator

from vestige.errors import SpecError
from vestige.settings._base import Input
from vestige.settings._shared import LaunchSettings, Options, Patterns, RowLists, RunFolder, TrainingFolder

_WAYS = "--drop ID, --rows FILE, --top N, --source NAME or --conflicts"


class FixSettings(LaunchSettings):
    """What `vestige fix` takes."""

    positional: ClassVar[tuple[str, ...]] = ("run",)
    repeatable: ClassVar[tuple[str, ...]] = ("drop", "rows", "source", "queries", "train")

    run: RunFolder[Path] = Field(
        description="Folder of a run made by `vestige attribute`, whose answers are to be fixed."
    )
    drop: Patterns = Field((), description="Rows to remove, by their ids; may be repeated.")
    rows: RowLists = Field(
        (),
        description="Remove the rows that a file lists: an id on each line, a report's row list, CSV or JSONL, or a "
        "folder of `vestige select`; may be repeated.",
    )
    top: PositiveInt | None = Field(
        None, description="Remove the N strongest proponents of each chosen query; copies of a text count as one."
    )
    source: Patterns = Field((), description="Remove every row whose `source` has this name; may be repeated.")
    conflicts: bool = Field(
        False,
        description="Remove the wrong side of each conflict: of two rows that answer the same question differently, "
        "the one that pulls towards the answer of a chosen query.",
    )
    queries: Patterns = Field(
        (), description="Ids of the queries that --top, --conflicts and the result are about. Not given: all."
    )
    out: Path | None = Field(
        None, description="Folder of the cleaned data, the trainings, the table and the page. Not given: RUN-fix."
    )
    seeds: PositiveInt = Field(3, description="Trainings of each kind, beginning with the recorded seed.")
    control: bool = Field(True, description="Also train without as many random rows, other ones for each seed.")
    expect: Annotated[Any, Input("vestige.data:require_queries", each=False)] = Field(
        None,
        description="File with the right answers: `expected`, or else the `completion` or the assistant's last turn, "
        "of queries by their ids.",
    )
    training: TrainingFolder[Path | None] = Field(
        None, description="Folder of `vestige train` that made the model. Not given: the one that the model lies in."
    )
    train: Options = Field(
        {},
        description="Setting of `vestige train`, written name=value, such as epochs=3, in place of the recorded one, "
        "or where no training was recorded; may be repeated.",
    )
    more_like: str | None = Field(
        None,
        description="Remove nothing: list the rows that are most like this one, by gradient and by words, to find "
        "what states the same thing.",
    )
    k: PositiveInt = Field(10, description="With --more-like: how many rows to list.")
    dry_run: bool = Field(False, description="Only list the rows, the trainings and what they will cost.")
    overwrite: bool = Field(False, description="Delete a fix that is already there instead of continuing it.")

    @model_validator(mode="before")
    @classmethod
    def _folder_beside_the_run(cls, given: Any) -> Any:
        """Put the result beside the run; what only lists rows has none."""
        if isinstance(given, Mapping) and given.get("more_like") is not None:
            return {**given, "out": None}
        if isinstance(given, Mapping) and given.get("out") is None and given.get("run"):
            run = Path(given["run"]).expanduser()
            return {**given, "out": run.with_name(f"{run.resolve().name}-fix")}
        return given

    @model_validator(mode="after")
    def _something_is_removed(self) -> Self:
        ways = [self.drop, self.rows, self.top, self.source, self.conflicts]
        if self.more_like is not None and any(ways):
            raise SpecError("--more-like only lists rows. Leave out what removes rows, and name them afterwards.")
        if self.more_like is None and not any(ways):
            raise SpecError(f"Nothing to remove. Type {_WAYS}; or --more-like ID to find the siblings of a row.")
        return self
