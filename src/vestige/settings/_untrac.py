"""What `vestige untrac` takes."""

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from vestige.settings._shared import LaunchSettings, QuestionSettings

Direction = Literal["untrac", "inverse"]
Level = Literal["source", "example"]
AscentOptimizer = Literal["adam", "rmsprop", "adafactor", "sgd"]


class UntracSettings(QuestionSettings, LaunchSettings):
    """What `vestige untrac` takes."""

    repeatable: ClassVar[tuple[str, ...]] = ("queries",)
    model: Any = Field(description="The model: a hub id, a folder, a GGUF file, an adapter or, in Python, a module.")
    data: Any = Field(description="The training data; its `source` column says which source an example is of.")
    queries: Any = Field(
        description="Test examples; those with the same `source` are one test set, one without is a set by itself."
    )
    out: Path = Field(description="Folder of the run: scores, curves and what they mean.")
    direction: Direction = Field(
        "inverse",
        description="untrac unlearns each training source and measures the test sets; inverse unlearns each test set "
        "and measures the training data, one ascent for each test set.",
    )
    level: Level = Field("source", description="Score training sources, or every training example.")
    optimizer: AscentOptimizer = Field("adam", description="What takes the steps of the ascent.")
    momentum: NonNegativeFloat = Field(0.0, description="Momentum of sgd and rmsprop.")
    learning_rate: PositiveFloat | None = Field(
        None,
        description="Step size. Not given: where curvature changes scores by a twentieth of what the slope does.",
    )
    batch_size: PositiveInt | None = Field(
        None, description="Examples in a step. Not given: 1 for untrac, 256 for inverse."
    )
    steps: PositiveInt | None = Field(
        None,
        description="Steps of each ascent. Not given: one pass over a source of mean size for untrac, 5 for inverse.",
    )
    samples: PositiveInt = Field(
        10_000, description="Level source: use at most N examples of each source, spread evenly over it."
    )
    points: PositiveInt = Field(4, description="Points of each curve, the last one at the end of the ascent.")
    stop: Literal["auto", "last"] = Field(
        "auto",
        description="Read the scores at the last point where the slope still decides them, or at the last point.",
    )
    retain: PositiveInt | None = Field(
        None,
        description="Hold the loss of the training data at its value with N examples in each step: curvature then "
        "counts as in an influence function. Needs --optimizer sgd, and three times the work of a step of this size.",
    )
    accelerate: bool = Field(
        False,
        description="With --retain and --direction inverse: Nesterov's momentum, so that as many steps reach further. "
        "For a model that is trained to the end: where its loss curves downwards, steps run away.",
    )
    weigh_by_size: bool = Field(
        False,
        description="Multiply a source's score by its share of the training data: its whole effect, not its mean.",
    )
    lora_rank: PositiveInt | None = Field(
        None, description="Move fresh LoRA matrices of this rank instead of the weights; a quantised model needs it."
    )
    gradient_checkpointing: bool = Field(
        False, description="Keep no activations of layers: less memory, a third slower."
    )
    max_new_tokens: PositiveInt = Field(64, description="Longest answer to generate for a query that has none.")
    k: PositiveInt = Field(20, description="Proponents, and as many opponents, to keep for each test set.")
    dense: bool = Field(False, description="Level example: also store the score of every example for every test set.")
    seed: int = Field(0, ge=0, description="Seed of the order of examples and of LoRA matrices.")
    overwrite: bool = Field(False, description="Replace a run that is already in the folder.")
