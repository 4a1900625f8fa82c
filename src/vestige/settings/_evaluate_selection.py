"""What `vestige evaluate selection` takes."""

from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from vestige.errors import SpecError
from vestige.settings._shared import LaunchSettings, Patterns, QuestionSettings

_DEFAULT_EPOCHS = 3


class SelectionSettings(QuestionSettings, LaunchSettings):
    """Is chosen data better than random data? Train on each, on random data of the same size and on everything."""

    repeatable: ClassVar[tuple[str, ...]] = ("selected",)

    selected: Patterns = Field(description="Folders that `vestige select` wrote, all from --data; may be repeated.")
    model: Any = Field(description="The model that each training begins from.")
    data: Any = Field(description="The data that was chosen from.")
    queries: Any = Field(description="Held-out examples of what the model is to be good at; not those of the scores.")
    out: Path = Field(description="Folder of the table as JSON, the figure, and the bank of trained models.")
    random_sets: PositiveInt = Field(3, description="Random sets of each size.")
    seeds: PositiveInt = Field(3, description="Training runs on each set, which differ in start and order of batches.")
    epochs: PositiveInt | None = Field(
        None,
        description="Length of each training: the steps of N passes over the largest chosen set. Not given: 3, "
        "or what --steps says.",
    )
    steps: PositiveInt | None = Field(None, description="Length of each training in steps.")
    learning_rate: PositiveFloat = Field(5e-5, description="Learning rate of each training at its highest.")
    batch_size: PositiveInt = Field(8, description="Examples in each training step.")
    from_scratch: bool = Field(False, description="Begin each training with random weights.")
    lora_rank: PositiveInt | None = Field(None, description="Train LoRA matrices of this rank instead of all weights.")
    draws: PositiveInt = Field(1000, description="Bootstrap draws behind each interval.")
    seed: NonNegativeInt = Field(0, description="Seed of the random sets and of the training runs.")

    @property
    def passes(self) -> int:
        """Passes over the largest chosen set, where `steps` does not decide."""
        return self.epochs or _DEFAULT_EPOCHS

    @model_validator(mode="after")
    def _settings_fit(self) -> Self:
        if not self.selected:
            raise SpecError("Nothing to compare: type --selected CHOSEN, made by `vestige select`.")
        if self.epochs is not None and self.steps is not None:
            raise SpecError("--epochs and --steps both say how long to train. Give one of them.")
        return self
