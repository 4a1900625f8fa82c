"""Settings of `vestige evaluate`: whose scores are judged, what they are held against, and where the result goes."""

import re
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
from vestige.settings._base import Basic, Common, Input, Named, OnlyWith, Size, parse_bytes
from vestige.settings._shared import (
    BankFolder,
    DataName,
    IndexFolder,
    LaunchSettings,
    MemberSettings,
    ModelName,
    Patterns,
    QueriesName,
    QuestionSettings,
    ReadingSettings,
    RowLists,
    TrackingSettings,
    one_or_several,
)

TruthValue = Literal["loss", "margin"]
_REFERENCE = re.compile(r"full|full_layers|(rank|naive_proj_layers)=[1-9][0-9]*")


def _split(value: Any) -> tuple[Any, ...]:
    """Split one value, several, or a text with commas into numbers."""
    values = (value,) if isinstance(value, str | int | float) else value or ()
    return tuple(part for one in values for part in (one.split(",") if isinstance(one, str) else (one,)) if part)


def _split_words(value: Any) -> tuple[str, ...]:
    """Split one value, several, or a text with commas into words."""
    return tuple(stripped for part in _split(value) if (stripped := str(part).strip()))


Words = Annotated[tuple[str, ...], BeforeValidator(_split_words)]
Numbers = Annotated[tuple[PositiveInt, ...], BeforeValidator(_split)]
Decimals = Annotated[tuple[PositiveFloat, ...], BeforeValidator(_split)]


class ScoredSettings(TrackingSettings, QuestionSettings):
    """Whose scores are judged.

    Runs that are there (`--run`), methods to run now (`--methods`), or both.
    """

    repeatable: ClassVar[tuple[str, ...]] = ("run", "methods")
    only_with: ClassVar[OnlyWith] = {"where": ("data", ())}

    out: Common[Path] = Field(description="Folder of the table as JSON, the figure, and the runs that are made for it.")
    run: Annotated[Patterns, Basic(), Input("vestige.runs:require_run")] = Field(
        (), description="Run directories that `vestige attribute` left; may be repeated."
    )
    methods: Annotated[Words, Basic(), Named("vestige.methods", "method", one_or_several)] = Field(
        (), description="Methods to run now, such as influence,grad-dot; their runs stay in OUT/runs."
    )
    index: IndexFolder[Any] = Field(
        None, description="Index for --methods, in place of the data; it may hold the model too."
    )
    model: ModelName = Field(None, description="Model for --methods and baselines.")
    data: DataName = Field(
        None, description="The training data: JSONL, JSON, CSV, Parquet, `datasets` folder or hub id."
    )
    queries: QueriesName = Field(None, description="The queries, as for `vestige attribute`.")
    opponents: bool = Field(
        True, description="Also judge the baselines random, bm25, rep-sim and grad-cos, given model, data and queries."
    )
    components: Patterns = Field(("default",), description="Parameters to attribute to, for --methods.")
    damping: PositiveFloat = Field(1.0, description="Damping of the curvature, for --methods that have one.")
    draws: PositiveInt = Field(1000, description="Bootstrap draws behind each interval.")
    seed: int = Field(0, description="Seed of every random choice.")

    @model_validator(mode="after")
    def _something_is_judged(self) -> Self:
        if not self.run and not self.methods:
            raise SpecError(
                "Nothing to judge: type --run RUN (made by `vestige attribute --dense`), or --methods "
                "influence,grad-dot with --model, --data and --queries."
            )
        return self


class LdsSettings(ScoredSettings):
    """Do scores predict what retrained models do? The linear datamodeling score, with intervals.

    For each query the scores of a subset's examples are added up, and ranked against the loss of the models that were
    trained on that subset.
    """

    bank: BankFolder[Path] = Field(description="Bank of models trained on random subsets, made by `vestige bank`.")
    value: TruthValue | None = Field(
        None,
        description="What the scores have to predict: loss, or margin (the log-odds of the answer, with its sign "
        "turned). Not given: loss, or margin where the bank holds no losses.",
    )
    damping_grid: Decimals = Field(
        (), description="Also these dampings for --methods influence; the best is chosen on a tenth of the queries."
    )
    shared_model: bool = Field(
        False, description="Judge scores of a model that is itself a member of the bank; its LDS is biased upwards."
    )


class SourcesSettings(ScoredSettings):
    """Do scores name the sources that matter? Correlation with retraining without each source."""

    bank: BankFolder[Path] = Field(
        description="Bank made with `vestige bank --leave-source-out` (or other lists left out)."
    )


class RemovalSettings(ScoredSettings, MemberSettings):
    """What do the queries lose when the models are retrained without the top examples? Curves by method."""

    repeatable: ClassVar[tuple[str, ...]] = (*ScoredSettings.repeatable, "rows")

    rows: RowLists = Field(
        (),
        description="Leave out just the rows that a file lists, against random lists of equal size: an id on each "
        "line, a report's row list, CSV or JSONL, or a folder of `vestige select`; may be repeated.",
    )
    remove: Numbers = Field((10, 20, 40), description="Of each method, how many examples are left out, such as 10,20.")
    random_lists: PositiveInt = Field(3, description="Random lists of each length.")
    seeds: PositiveInt = Field(2, description="Retrained models for each list.")
    start: ModelName = Field(None, description="Model that each training begins from. Not given: --model.")

    @property
    def judges_methods(self) -> bool:
        """True if scores are judged, and not only lists of rows."""
        return bool(self.run or self.methods)

    @model_validator(mode="after")
    def _something_is_judged(self) -> Self:
        if not self.judges_methods and not self.rows:
            raise SpecError(
                "Nothing to leave out: type --rows FILE, --run RUN (made by `vestige attribute --dense`), or --methods "
                "influence,grad-dot; with --model, --data and --queries."
            )
        return self


class TailPatchSettings(ScoredSettings):
    """Does one training step on each top example make the target likelier? No retraining."""

    k: PositiveInt = Field(10, description="Top examples of each query that a step is taken on, each from the start.")
    learning_rate: PositiveFloat = Field(1e-3, description="Length of the step: plain gradient descent.")


class MislabelSettings(ScoredSettings):
    """Does self-influence find wrong labels? Area under the curve, and recall by fraction inspected."""

    truth: str = Field("mislabelled", description="Column of the data that is true where the label is wrong.")
    inspected: Decimals = Field(
        (0.05, 0.1, 0.2, 0.3, 0.5), description="Shares of the data that are read, highest self-influence first."
    )


class RetrievalSettings(ScoredSettings):
    """Do scores find the examples that state the fact? Recall and mean reciprocal rank."""

    truth: str = Field("answers", description="Column of the queries: the id of the right example, or several ids.")
    k: Numbers = Field((1, 5, 10, 50), description="Lengths of lists whose recall is measured, such as 1,10.")


class RandomisationSettings(ScoredSettings):
    """Do scores change when the model's weights are randomised? Scores that do not were never about them."""

    seeds: PositiveInt = Field(2, description="Randomised models.")


class OverlapSettings(ScoredSettings):
    """Do different queries and methods name different examples? Overlap of lists, hubs, correlations of scores."""

    k: PositiveInt = Field(10, description="Length of the lists; runs keep 20 unless more were requested.")


class SelectionSettings(MemberSettings, QuestionSettings, LaunchSettings):
    """Is chosen data better than random data? Train on each, on random data of the same size and on everything."""

    repeatable: ClassVar[tuple[str, ...]] = ("selected",)

    selected: Annotated[Patterns, Input("vestige.selection:require_selection")] = Field(
        description="Folders that `vestige select` wrote, all from --data; may be repeated."
    )
    model: ModelName = Field(description="The model that each training begins from.")
    data: DataName = Field(description="The data that was chosen from.")
    queries: QueriesName = Field(
        description="Held-out examples of what the model is to be good at; not those of the scores."
    )
    out: Common[Path] = Field(description="Folder of the table as JSON, the figure, and the bank of trained models.")
    random_sets: PositiveInt = Field(3, description="Random sets of each size.")
    seeds: PositiveInt = Field(3, description="Training runs on each set, which differ in start and order of batches.")
    draws: PositiveInt = Field(1000, description="Bootstrap draws behind each interval.")
    seed: NonNegativeInt = Field(0, description="Seed of the random sets and of the training runs.")

    @model_validator(mode="after")
    def _settings_fit(self) -> Self:
        if not self.selected:
            raise SpecError("Nothing to compare: type --selected CHOSEN, made by `vestige select`.")
        return self


class SketchSettings(TrackingSettings, ReadingSettings):
    """Measure how far compressed inner products are from exact ones, by compressor and size.

    Every pair of the first examples and the remaining ones is compared, for several random sketches of each size.
    Interrupted at any moment, the same command continues; other compressors, sizes and seeds are added to what is
    there.
    """

    model: ModelName = Field(
        None,
        description="The model: hub id, local folder, GGUF folder or PEFT adapter folder. Not given: several --index "
        "are compared with the widest of them, or with --reference rank=K.",
    )
    data: DataName = Field(None, description="The examples: JSONL, JSON, CSV, Parquet, `datasets` folder or hub id.")
    out: Common[Path] = Field(description="Folder of the table, the figures and what a later call can use again.")
    compress: Patterns = Field(
        (),
        description="Compressors, with K for the size and R for its square root: 'mask:2Rx2R | sjlt:K'. "
        "Not given: the published ones.",
    )
    sizes: Numbers = Field((64, 256, 1024), description="Numbers per component, such as 64,256,1024.")
    seeds: PositiveInt = Field(3, description="Random sketches of each size; errors are averaged over them.")
    components: Patterns = Field(
        ("default",), description="Parameters whose gradients are compressed, as in `vestige index`."
    )
    reference: str = Field(
        "full_layers",
        description="What is right: full_layers (exact, selected parameters), full (exact, all parameters), rank=K "
        "(the sketch of that size) or naive_proj_layers=K (exact gradients, projected after they were formed).",
    )
    num_ref: PositiveInt = Field(50, description="The first N examples, which are compared with all others.")
    samples: PositiveInt = Field(256, description="The first N examples of the data take part.")
    index: Patterns = Field((), description="Folders of finished indexes of this model and data, measured too.")
    memory: Size | None = Field(
        None, description="Most memory for exact gradients, such as 4GB. Not given: half of what is free."
    )

    @field_validator("reference")
    @classmethod
    def _reference_is_known(cls, reference: str) -> str:
        if not _REFERENCE.fullmatch(reference):
            raise ValueError("full_layers, full, rank=K or naive_proj_layers=K, K being a size such as 1024")
        return reference

    @field_validator("sizes")
    @classmethod
    def _sizes_are_given(cls, sizes: tuple[int, ...]) -> tuple[int, ...]:
        if not sizes:
            raise ValueError("at least one size, such as 256")
        return tuple(sorted(set(sizes)))

    @model_validator(mode="after")
    def _something_is_compared(self) -> Self:
        if (self.model is None) != (self.data is None):
            raise SpecError("--model and --data go together. Without both, several --index are compared.")
        if self.model is None and (len(self.index) < 2 or self.compress or self.reference_mode == "naive_proj_layers"):
            raise SpecError(
                "Nothing to compare: give --model and --data, or two or more --index and at most --reference rank=K."
            )
        if self.model is None and self.reference_mode == "full":
            raise SpecError("--reference full takes gradients of the whole model: give --model and --data.")
        return self

    @property
    def reference_mode(self) -> str:
        """The reference without its size."""
        return self.reference.partition("=")[0]

    @property
    def reference_size(self) -> int | None:
        """The K of rank=K and naive_proj_layers=K."""
        size = self.reference.partition("=")[2]
        return int(size) if size else None

    @property
    def memory_bytes(self) -> int | None:
        """The memory for exact gradients in bytes."""
        return None if self.memory is None else parse_bytes(self.memory)


class ComponentsSettings(TrackingSettings, QuestionSettings, LaunchSettings):
    """Which components suffice? Accuracy and agreement of each, and of sets chosen on other queries.

    Queries are paraphrases of training examples, or answers to them, and carry the id of their original. Each distinct
    gradient is computed once; full gradient, every set of components, projections and layer outputs follow from its
    products. Interrupted at any moment, the same command continues.
    """

    model: ModelName = Field(description="The model: hub id, local folder, GGUF folder or PEFT adapter folder.")
    data: DataName = Field(description="The originals: JSONL, JSON, CSV, Parquet, `datasets` folder or hub id.")
    queries: QueriesName = Field(description="The paraphrases, with answers, and with the id of the original of each.")
    out: Common[Path] = Field(description="Folder of the products, the table, the figures and the chosen components.")
    truth: str = Field("original_id", description="Column of the queries that holds the id of the original.")
    query_column: str | None = Field(
        None,
        description="Column of the queries that holds their turns where a row holds the original too, such as "
        "paraphrased_messages or model_generated_messages; the original is then the example with the row's id.",
    )
    limit_queries: PositiveInt | None = Field(None, description="Use only the first N queries; --limit is of --data.")
    candidates: Words = Field(
        ("5",),
        description="Candidates of each query: the first N of BM25 over prompts, or all; several such as "
        "5,50,all in one pass; or given: the ids in the column `candidates` of the queries.",
    )
    include_original: bool = Field(
        False, description="Put the original last where BM25 does not list it, as was published."
    )
    components: Patterns = Field(("default",), description="Parameters that take part, as in `vestige index`.")
    project: Words = Field(
        (),
        description="Random projections to compare with: numbers for each component, or a share of all parameters, "
        "such as 256,1%,5%.",
    )
    projector: Literal["tensorsketch", "sjlt", "rademacher", "gauss"] = Field(
        "tensorsketch",
        description="The random map of --project: tensorsketch works on factors, sjlt needs memory for a number of "
        "each parameter, rademacher, the published one, and gauss take hours for large layers.",
    )
    enough: PositiveFloat = Field(
        0.99, le=1, description="Agreement with the full gradient at which the search for agreement stops."
    )
    folds: PositiveInt = Field(5, ge=2, description="Parts of the queries; sets are judged on the part left out.")
    longest: PositiveInt = Field(40, description="Most components in a set that is chosen without a fold.")
    figures: bool = Field(True, description="Also draw the figures, which takes some seconds.")
    draws: PositiveInt = Field(1000, description="Bootstrap draws behind each interval.")
    seed: int = Field(0, description="Seed of projections, folds and bootstrap.")

    added: ClassVar[tuple[str, ...]] = (*QuestionSettings.added, "query_column", "limit_queries")

    @field_validator("candidates")
    @classmethod
    def _candidates_are_known(cls, candidates: tuple[str, ...]) -> tuple[str, ...]:
        numbers = [word for word in candidates if word.isdigit() and int(word) > 0]
        if not candidates or len(numbers) + candidates.count("all") + candidates.count("given") < len(candidates):
            raise ValueError("numbers such as 5, all, or given")
        return tuple(dict.fromkeys(candidates))
