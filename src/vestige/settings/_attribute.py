"""What `vestige index`, `vestige doctor`, `vestige precondition`, `vestige attribute` and `vestige untrac` take."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from vestige.errors import SpecError
from vestige.settings._base import Basic, Common, Input, Named, OnlyWith
from vestige.settings._shared import (
    BankFolder,
    CompressionSettings,
    Damping,
    DataName,
    IndexFolder,
    LaunchSettings,
    ModelName,
    Numbers,
    Options,
    Patterns,
    QueriesName,
    QuestionSettings,
    ReadingSettings,
    TrainingFolder,
)


class PreconditionSettings(LaunchSettings):
    """What `vestige precondition` takes."""

    positional: ClassVar[tuple[str, ...]] = ("index",)
    index: IndexFolder[Path] = Field(description="Folder of an index made by `vestige index`.")
    damping: Common[PositiveFloat] = Field(1.0, description="Damping of the inverse, relative to the mean eigenvalue.")
    out: Common[Path | None] = Field(
        None, description="Folder for the preconditioned gradient of every example. Not given: the curvature alone."
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Number format of what goes to --out.")
    profile: bool = Field(False, description="Measure where the time goes: a table, and profile.json with the result.")


class IndexSettings(ReadingSettings, CompressionSettings, LaunchSettings):
    """What `vestige index` takes."""

    positional: ClassVar[tuple[str, ...]] = ("model", "data")
    runs_sharded: ClassVar[bool] = True
    added: ClassVar[tuple[str, ...]] = (*ReadingSettings.added, "verbatim")

    model: ModelName = Field(description="The model: hub id, local folder, GGUF folder or PEFT adapter folder.")
    data: DataName = Field(
        description="The training data: JSONL, JSON, CSV, Parquet: a file, or several (a folder, 'parts/*.jsonl'); a "
        "`datasets` folder or a hub id."
    )
    out: Common[Path] = Field(description="Folder of the index; an interrupted run continues in it.")
    append: Common[bool] = Field(
        False, description="Add the rows that the data gained since; old shards stay untouched."
    )
    verbatim: bool = Field(
        False, description="Also sort all tokens, so that attribute --verbatim says at once where an answer stands."
    )
    skip_bad: bool = Field(
        False, description="Leave out, and list, examples whose loss or gradient is NaN or infinite, instead of ending."
    )
    profile: bool = Field(False, description="Measure where the time goes: a table, and profile.json with the index.")
    overwrite: bool = Field(False, description="Delete an index that is already there instead of continuing it.")


class DoctorSettings(ReadingSettings, CompressionSettings):
    """What `vestige doctor` takes."""

    model: ModelName = Field(description="The model: hub id, local folder, GGUF folder or PEFT adapter folder.")
    data: DataName = Field(
        description="The training data: JSONL, JSON, CSV, Parquet: a file, or several (a folder, 'parts/*.jsonl'); a "
        "`datasets` folder or a hub id."
    )


Direction = Literal["untrac", "inverse"]
Level = Literal["source", "example"]
AscentOptimizer = Literal["adam", "rmsprop", "adafactor", "sgd"]


class UntracSettings(QuestionSettings, LaunchSettings):
    """What `vestige untrac` takes."""

    repeatable: ClassVar[tuple[str, ...]] = ("queries",)
    model: ModelName = Field(
        description="The model: a hub id, a folder, a GGUF file, an adapter or, in Python, a module."
    )
    data: DataName = Field(description="The training data; its `source` column says which source an example is of.")
    queries: QueriesName = Field(
        description="Test examples; those with the same `source` are one test set, one without is a set by itself."
    )
    out: Common[Path] = Field(description="Folder of the run: scores, curves and what they mean.")
    direction: Common[Direction] = Field(
        "inverse",
        description="untrac unlearns each training source and measures the test sets; inverse unlearns each test set "
        "and measures the training data, one ascent for each test set.",
    )
    level: Common[Level] = Field("source", description="Score training sources, or every training example.")
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


_OF_A_TRAINING = (
    *("index", "checkpoints", "query_rank", "components", "skip_bad", "limit", "where", "max_length", "precision"),
    "weigh_by",
)
"""Settings that a recorded training decides, or that its methods do not know."""

_NOT_ON_A_LADDER = ("checkpoints", "workers", "engine", "shard", "profile")

AnswerSource = Literal["auto", "generate", "given"]


class AttributeSettings(QuestionSettings, LaunchSettings):
    """What `vestige attribute` takes."""

    positional: ClassVar[tuple[str, ...]] = ("queries",)
    runs_sharded: ClassVar[bool] = True
    only_with: ClassVar[OnlyWith] = {
        "where": ("data", ()),
        "checkpoint_weights": ("checkpoints", ()),
        "rerank_method": ("rerank", ()),
        "verbatim_tokens": ("verbatim", ()),
    }
    added: ClassVar[tuple[str, ...]] = (
        *QuestionSettings.added,
        *("weigh_by", "rerank", "rerank_method", "bank", "verbatim", "verbatim_tokens"),
    )
    repeatable: ClassVar[tuple[str, ...]] = ("queries", "options", "index", "training", "checkpoints", "damping")
    index: IndexFolder[Any] = Field(None, description="Folder of an index made by `vestige index`.")
    model: ModelName = Field(None, description="Without an index: the model, as for `vestige index`.")
    data: DataName = Field(None, description="Without an index: the training data, streamed once and not stored.")
    checkpoints: Annotated[Any, Input("vestige.models:require_place")] = Field(
        None,
        description="For tracin, less and trak, in place of the model: a Trainer's run, or a folder for each "
        "checkpoint or model. An --index for each may be given in the same order.",
    )
    training: TrainingFolder[Any] = Field(
        None,
        description="For methods that follow a training, in place of model and data: folder of a finished `vestige "
        "train`; several, of other seeds, are averaged.",
    )
    checkpoint_weights: Numbers | None = Field(
        None, description="How much each checkpoint counts. Not given: its learning rate; for trak all the same."
    )
    queries: QueriesName = Field(
        description="What to explain: a file with prompts or answers, or the questions themselves."
    )
    method: Annotated[str, Basic(), Named("vestige.methods", "method")] = Field(
        "influence",
        description="How to score: influence, ekfac-index, grad-dot, grad-cos, ekfac, kfac, datainf, cg, lissa, "
        "arnoldi, tracin, less, trak, replay, rep-sim, activation-dot, bm25, verbatim or random.",
    )
    out: Common[Path] = Field(description="Folder of the run: scores, examples and what they mean.")
    k: Common[PositiveInt] = Field(20, description="Proponents, and as many opponents, to keep for each query.")
    tokens: Common[bool] = Field(False, description="Also score every training token; they sum to the example's score.")
    verbatim: Common[bool] = Field(
        False,
        description="Also say where the answer stands word for word in the training data, and whether it is memorized.",
    )
    verbatim_tokens: PositiveInt = Field(4, description="With --verbatim: tokens of the shortest span.")
    components: Patterns = Field(
        ("default",), description="Without an index: parameters to attribute to, as for `vestige index`."
    )
    skip_bad: bool = Field(
        False,
        description="Without an index: leave out, and list, examples whose loss or gradient is NaN or infinite, "
        "instead of ending; costs a pass over the data.",
    )
    rerank: PositiveInt | None = Field(
        None,
        description="Score exactly what is among the first N of this ranking, of a word search or of texts in common; "
        "the run is then of those rows, and says where they stood.",
    )
    rerank_method: Annotated[str, Named("vestige.methods", "method")] = Field(
        "ekfac", description="With --rerank: the exact method: ekfac, grad-dot, ..., or replay with --training."
    )
    bank: BankFolder[Path | None] = Field(
        None,
        description="With --verbatim: a bank of models of the same data, for whether rows are memorized. With --rerank "
        "also of the same queries: every rung is judged by it.",
    )
    weigh_by: str | None = Field(
        None,
        description="Column of the training data, such as reward or advantage, that each example's gradient is "
        "multiplied with: a number of any sign, as a policy gradient does.",
    )
    damping: Damping = Field(
        1.0,
        description="Damping of the curvature, relative to its mean eigenvalue, for methods that have one. Several, "
        "such as 0.01,0.1,1, or sweep (0.001 to 100) are scored in one pass by influence, ekfac-index, ekfac, kfac and "
        "datainf: the run is at the one closest to 1, the others are runs in OUT/damping-X.",
    )
    query_rank: PositiveInt | None = Field(
        None,
        description="Without an index: keep this many singular vectors of each query's matrices. Faster where tokens "
        "are few and layers wide; exact from the rank of the matrices on. Not given: exact.",
    )
    self_influence: bool = Field(False, description="Also score every training example against itself.")
    dense: bool = Field(False, description="Also store the score of every training example for every query.")
    answer: AnswerSource = Field(
        "auto",
        description="Explain the answer given with the query, or generate it; auto generates missing ones.",
    )
    max_new_tokens: PositiveInt = Field(64, description="Longest answer to generate.")
    options: Options = Field(
        {},
        description="Option of the method, written name=value, such as labels=data; may be repeated. `vestige methods "
        "NAME` lists those of a method, and so does the answer to an unknown name.",
    )
    trust: bool = Field(True, description="Run the free checks that say how far the scores can be trusted.")
    seed: int = Field(0, description="Seed of every random choice.")
    profile: bool = Field(False, description="Measure where the time goes: a table, and profile.json in the run.")
    overwrite: bool = Field(False, description="Replace a run that is already in the folder.")

    @property
    def swept(self) -> bool:
        """True if several dampings were given."""
        return isinstance(self.damping, tuple)

    def _check_ladder(self) -> None:
        """Raise where the rungs of a ladder cannot do what was requested."""
        given = self.flags_given(*_NOT_ON_A_LADDER)
        if given or self.swept:
            raise SpecError(
                f"--rerank scores in this process, with one damping: drop {given or 'several --damping'}. An index may "
                "be made with --workers before."
            )

    @model_validator(mode="after")
    def _index_or_data(self) -> Self:
        if self.rerank is not None:
            self._check_ladder()
        elif self.bank is not None and not self.verbatim:
            raise SpecError("--bank has no effect without --rerank or --verbatim. Give one of them, or leave it out.")
        if self.training is not None and self.rerank is None:
            if given := self.flags_given(*_OF_A_TRAINING):
                raise SpecError(f"--training brings its model, its data and all trained parameters: drop {given}.")
        elif self.index is None:
            # Whether a model is needed depends on the method: lexical ones read text alone.
            if self.data is None:
                raise SpecError(
                    "Neither `index` nor `data` was given. Type --index FOLDER (made by `vestige index`), or "
                    "--model MODEL --data FILE to score without an index."
                )
        elif self.data is not None:
            raise SpecError("`index` and `data` were both given, but an index holds its data. Drop one of them.")
        elif self.skip_bad:
            raise SpecError(
                "`skip_bad` is chosen when an index is made. Drop --skip-bad, or make the index with it: "
                "vestige index --skip-bad."
            )
        elif self.query_rank is not None:
            raise SpecError(
                "`query_rank` shortens whole gradients, and an index holds compressed ones. Drop --query-rank, or give "
                "--model and --data in place of --index."
            )
        elif self.components != ("default",):
            raise SpecError("`components` are fixed by the index. Drop --components, or make another index with it.")
        return self
