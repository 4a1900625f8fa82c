"""The settings of `vestige train`, `vestige bank` and `vestige fix`, which trains again."""

import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from vestige.errors import SpecError
from vestige.settings._base import Common, Input, flag
from vestige.settings._shared import (
    DataName,
    LaunchSettings,
    LearningSettings,
    MemberSettings,
    ModelName,
    Options,
    Paths,
    Patterns,
    Precision,
    QueriesName,
    QuestionSettings,
    ReadingSettings,
    RowLists,
    RunFolder,
    TrainedOn,
    TrainingFolder,
)

_OF_ADOPTED = {
    *("model", "data", "out", "queries", "from_trainings", "keep_weights", "overwrite"),
    *("loss", "token_budget", "device"),
}
"""Settings of a bank whose models are trained already."""


class BankSettings(MemberSettings, QuestionSettings, LaunchSettings):
    """What `vestige bank` takes."""

    files: ClassVar[tuple[str, ...]] = (*QuestionSettings.files, "from_trainings")

    model: ModelName = Field(None, description="The model: hub id, local folder, GGUF folder or PEFT adapter folder.")
    data: DataName = Field(None, description="The training data: JSONL, JSON, CSV, Parquet, `datasets` or hub id.")
    from_trainings: Annotated[Paths, Input("vestige.training:require_trainings")] = Field(
        (),
        description="Train nothing: measure the models in these folders of `vestige train`, or in a folder of them "
        "such as a sweep's; they differ in --split-seed and --seed alone.",
    )
    out: Common[Path] = Field(
        description="Folder of the bank; an interrupted run continues in it, a larger one extends it."
    )
    queries: QueriesName = Field(
        None, description="Texts that are not trained on, whose losses every member also stores."
    )
    subsets: Common[PositiveInt] = Field(
        50, le=1_000_000, description="Random subsets to train on, unless a way of leaving out is given."
    )
    fraction: float = Field(0.5, gt=0, lt=1, description="Share of the distinct examples in each random subset.")
    leave_source_out: Common[bool] = Field(
        False, description="Train without each `source` of the data in turn, and once on everything."
    )
    leave_out_lists: Annotated[Any, Input("vestige.data:require_row_list")] = Field(
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
    seeds: Common[PositiveInt] = Field(
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
        if any(ways) and self.flags_given("subsets", "fraction"):
            raise SpecError("--subsets and --fraction are for random subsets; leave them out where something is left.")
        if not self.from_trainings:
            for name in ("model", "data"):
                if getattr(self, name) is None:
                    meaning = type(self).model_fields[name].description
                    raise SpecError(
                        f"`{name}` is missing: {meaning} Type {flag(name)} VALUE, or --from-trainings RUNS."
                    )
        else:
            kept = {*_OF_ADOPTED, *LaunchSettings.model_fields}
            if given := self.flags_given(*(name for name in type(self).model_fields if name not in kept)):
                raise SpecError(f"{given}: the trainings of --from-trainings have settled that. Leave it out.")
        return self


AlarmMeasure = Literal["psmi", "loss", "gap"]

_AND_SO_ON = "..."
MOST_CHECKPOINTS = 10_000
"""A checkpoint is a copy of the model: more of them are a slip of the pen."""


def _as_words(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:g}"
    return ",".join(str(part) for part in value) if isinstance(value, list | tuple) else value


Epochs = Annotated[str, BeforeValidator(_as_words)]
"""Epochs as words such as 0,0.2,...,1,2,...; a list of numbers is joined."""


def list_epochs(words: str, last: float) -> tuple[float, ...]:
    """Return the epochs that `words` stand for, ascending, up to `last`.

    Three dots go on as the two numbers before them do, to the number that follows or, at the end, to `last`:
    `0,0.2,...,1,2,...` is 0, 0.2, 0.4, 0.6, 0.8, 1, 2, 3 and so on.

    Raises:
        SpecError: A word that is no number of epochs, dots without two numbers before them, or a falling order.
    """
    found: list[float] = []
    parts = [word.strip() for word in words.split(",") if word.strip()]
    for place, word in enumerate(parts):
        if word != _AND_SO_ON:
            found.append(_epoch(word))
            continue
        if len(found) < 2 or found[-1] <= found[-2]:
            raise SpecError(
                f"--checkpoints {words}: expected two ascending numbers before ..., such as 0,0.2,...,1,2,..."
            )
        ends = place + 1 == len(parts)
        stop, begin, step = last if ends else _epoch(parts[place + 1]), found[-1], found[-1] - found[-2]
        # Each from the beginning, not from the one before: rounding does not add up.
        if (stop - begin) / step > MOST_CHECKPOINTS:
            raise SpecError(
                f"--checkpoints {words}: these are more than {MOST_CHECKPOINTS:,} checkpoints. Give a larger step."
            )
        count = math.floor((stop - begin) / step + 1e-9)
        found += [round(begin + number * step, 9) for number in range(1, count + 1)]
        if not ends and found[-1] == _epoch(parts[place + 1]):
            found.pop()
    if not found or any(after <= before for before, after in pairwise(found)):
        raise SpecError(f"--checkpoints {words}: expected ascending numbers of epochs, such as 0,0.2,...,1,2,...")
    return tuple(epoch for epoch in found if epoch <= last)


def _epoch(word: str) -> float:
    try:
        number = float(word)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise SpecError(f"--checkpoints: expected numbers of epochs separated by commas, where {word!r} was given.")
    return number


class AlarmSettings(ReadingSettings):
    """The early alarm."""

    alarm: Common[bool] = Field(
        False, description="Once training losses have fallen, list the examples that will be memorized."
    )
    alarm_measure: AlarmMeasure = Field("psmi", description="What the alarm computes of each example.")
    alarm_layer: str = Field(
        "last",
        description="psmi: layer whose states are measured: last, smi (predicts the answers best) or a number.",
    )
    alarm_below: float = Field(
        0.05,
        gt=0,
        lt=1,
        description="The alarm is triggered when the median loss is below this share of what it began with.",
    )
    alarm_window: PositiveInt = Field(500, description="Losses of training examples in a median; at most one epoch.")
    alarm_threshold: float | None = Field(
        None, description="Flag examples at least as much at risk as this value of the measure."
    )
    alarm_quantile: float | None = Field(
        None, gt=0, lt=1, description="Flag this share of the examples, those most at risk."
    )

    @field_validator("alarm_layer", mode="before")
    @classmethod
    def _layer_is_known(cls, layer: Any) -> Any:
        if str(layer) not in ("last", "smi") and not str(layer).isdigit():
            raise ValueError("last, smi or the number of a layer")
        return str(layer)


class TrainSettings(LearningSettings, AlarmSettings):
    """What `vestige train` takes."""

    added: ClassVar[tuple[str, ...]] = (
        *AlarmSettings.added,
        *("epochs", "steps", "from_scratch", "momentum", "validation", "select", "score_optimizer"),
    )

    model: ModelName = Field(
        description="The model to begin with: hub id, local folder, GGUF folder or PEFT adapter folder."
    )
    data: DataName = Field(description="The training data: JSONL, JSON, CSV, Parquet, `datasets` folder or hub id.")
    out: Common[Path] = Field(description="Folder of the training; an interrupted one continues in it.")
    loss: TrainedOn = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        "completion",
        description="Learn the whole completion (of a text all of it), or its answer without the end of the text.",
    )
    precision: Precision = Field(
        "float32",
        description="Number format of the weights; auto is the model's own, in which small steps may be lost.",
    )
    split_fraction: float = Field(
        1.0, gt=0, le=1, description="Share of the distinct examples to train on, drawn at random."
    )
    split_seed: NonNegativeInt = Field(0, description="Seed of that draw.")
    group: str | None = Field(
        None,
        description="Column whose rows of equal value are drawn together. Not given: copies, rows with the same tokens "
        "and targets.",
    )
    epochs: Common[PositiveFloat | None] = Field(
        None,
        description="Passes over the examples that are trained on; may be a fraction. Not given: 1, or what --steps "
        "says.",
    )
    checkpoints: Common[Epochs] = Field(
        "0,1,...", description="Epochs at which to save, such as 0,0.2,...,1,2,...; the end is always saved."
    )
    seed: NonNegativeInt = Field(
        0, le=2**32 - 1, description="Seed of LoRA's start, the order of the examples and dropout."
    )
    keep_optimizer: bool = Field(
        True, description="Keep the optimizer's state in every checkpoint, which less needs, not in the last alone."
    )
    losses: bool = Field(True, description="At every checkpoint, measure the loss of every example of the data.")
    validation: QueriesName = Field(
        None,
        description="Examples whose mean loss is to fall: what each training example does to it in every step is "
        "written as a run, OUT/in-run.",
    )
    select: PositiveInt | None = Field(
        None, description="Of every batch, train only on the N examples that lower the loss of --validation most."
    )
    score_optimizer: Literal["as-is", "sgd"] = Field(
        "as-is",
        description="Score the steps by --validation as the optimizer takes them, or as if they were plain gradient "
        "descent.",
    )
    overwrite: bool = Field(False, description="Delete a training that is already there instead of continuing it.")

    @property
    def passes(self) -> float | None:
        """Epochs that decide the length, None if `steps` does."""
        return self.epochs or (1.0 if self.steps is None else None)

    def count_steps(self, per_epoch: int) -> int:
        """Return the steps of the training, of which a pass has `per_epoch`."""
        return self.steps or max(1, int((self.passes or 0) * per_epoch + 0.5))

    @model_validator(mode="after")
    def _settings_fit(self) -> Self:
        list_epochs(self.checkpoints, self.passes or 1.0)
        of_alarm = [name for name in AlarmSettings.model_fields if name.startswith("alarm_")]
        if not self.alarm and (given := self.flags_given(*of_alarm)):
            raise SpecError(f"{given}: of the alarm, which --alarm turns on.")
        if self.select is not None and (self.validation is None or self.accumulation > 1):
            raise SpecError("--select chooses from each batch by --validation, and without --accumulation.")
        if self.validation is not None and self.gradient_checkpointing:
            raise SpecError("--validation reads activations, which --gradient-checkpointing does not keep.")
        if self.alarm_threshold is not None and self.alarm_quantile is not None:
            raise SpecError("--alarm-threshold and --alarm-quantile both say whom to flag. Give one of them.")
        return self


_WAYS = "--drop ID, --rows FILE, --top N, --source NAME or --conflicts"


class FixSettings(LaunchSettings):
    """What `vestige fix` takes."""

    positional: ClassVar[tuple[str, ...]] = ("run",)
    repeatable: ClassVar[tuple[str, ...]] = ("rows", "train")

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
