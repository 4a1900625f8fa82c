"""What `vestige study` takes."""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from vestige.settings._launch import LaunchSettings

StudySize = Literal["tiny", "pocket", "paper"]


class StudySettings(LaunchSettings):
    """What `vestige study` takes."""

    positional: ClassVar[tuple[str, ...]] = ("name",)
    name: str = Field(
        description="Which experiment: untrac-miniature, format-traps, digits, text-lds, domains, selection-domains, "
        "memorization-planted, memorization-facts, memorization-canaries, memorization-early, "
        "select-or-project, or one part of it: select-or-project-verses or select-or-project-answers."
    )
    out: Path = Field(
        description="Folder for models, runs, study.json and the table; an interrupted study goes on there."
    )
    size: StudySize = Field(
        "pocket",
        description="pocket runs in minutes on a laptop; paper is the published size; tiny shows that it runs.",
    )
    seeds: PositiveInt = Field(2, description="Repetitions, which differ in data, start and order.")
    seed: NonNegativeInt = Field(0, description="The first seed.")
