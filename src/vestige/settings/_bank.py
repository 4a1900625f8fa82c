"""What `vestige bank` takes."""

from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from vestige.errors import SpecError
from vestige.settings._member import MemberSettings
from vestige.settings._shared import LaunchSettings, QuestionSettings


class BankSettings(MemberSettings, QuestionSettings, LaunchSettings):
    """What `vestige bank` takes."""

    never_repeated: ClassVar[tuple[str, ...]] = ("overwrite",)

    model: Any = Field(description="The model: hub id, local folder, GGUF folder or PEFT adapter folder.")
    data: Any = Field(description="The training data: JSONL, JSON, CSV, Parquet, `datasets` folder or hub id.")
    out: Path = Field(description="Folder of the bank; an interrupted run continues in it, a larger one extends it.")
    queries: Any = Field(None, description="Texts that are not trained on, whose losses every member also stores.")
    subsets: PositiveInt = Field(
        50, le=1_000_000, description="Random subsets to train on, unless a way of leaving out is given."
    )
    fraction: float = Field(0.5, gt=0, lt=1, description="Share of the distinct examples in each random subset.")
    leave_source_out: bool = Field(
        False, description="Train without each `source` of the data in turn, and once on everything."
    )
    leave_out_lists: Any = Field(
        None,
        description="Train without each list of examples, and once on everything: JSON with lists of ids, by name or "
        "in order, or a file that lists rows, such as a report's row list.",
    )
    leave_one_out: PositiveInt | None = Field(
        None,
        description="Train without each of N examples and their copies, drawn at random, and once on everything.",
    )
    group: str | None = Field(
        None,
        description="Column whose rows of equal value are drawn, or left out as one, together. Not given: copies, rows "
        "with the same tokens and targets.",
    )
    seeds: PositiveInt = Field(
        2, le=1_000_000, description="Runs of each subset, which differ in start and order of batches."
    )
    seed: NonNegativeInt = Field(0, description="Seed of the subsets and, apart from them, of the runs.")
    keep_weights: bool = Field(False, description="Also store each trained model, as a folder that loads.")
    checkpoint_every: PositiveInt | None = Field(
        None, description="Steps after which a member under training is saved, to continue there after a kill."
    )
    overwrite: bool = Field(False, description="Delete a bank that is already there instead of continuing it.")

    @model_validator(mode="after")
    def _settings_fit(self) -> Self:
        ways = [self.leave_source_out, self.leave_out_lists is not None, self.leave_one_out is not None]
        if sum(ways) > 1:
            raise SpecError("--leave-source-out, --leave-out-lists and --leave-one-out each need a bank of their own.")
        if any(ways) and not self._random_defaults():
            raise SpecError("--subsets and --fraction are for random subsets; leave them out where something is left.")
        return self

    def _random_defaults(self) -> bool:
        fields = type(self).model_fields
        return all(getattr(self, name) == fields[name].default for name in ("subsets", "fraction"))
