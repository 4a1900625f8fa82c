"""What `vestige study` takes."""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from vestige.settings._base import Settings

StudySize = Literal["pocket", "paper"]


class StudySettings(Settings):
    """What `vestige study` takes."""

    positional: ClassVar[tuple[str, ...]] = ("name",)
    name: str = Field(description="Which experiment: untrac-miniature.")
    out: Path = Field(
        description="Folder for models, runs, study.json and the table; an interrupted study goes on there."
    )
    size: StudySize = Field("pocket", description="pocket runs in minutes on a laptop; paper is the published size.")
    seeds: PositiveInt = Field(2, description="Repetitions, which differ in data, start and order.")
    seed: NonNegativeInt = Field(0, description="The first seed.")
