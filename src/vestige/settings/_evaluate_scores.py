"""What the evaluations of scores take: whose scores, what they are held against, and where it goes."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt, model_validator

from vestige.errors import SpecError
from vestige.settings._evaluate_sketch import Numbers
from vestige.settings._member import MemberSettings
from vestige.settings._shared import Patterns, QuestionSettings


def _words(value: Any) -> Any:
    """Split one, several, or a text with commas into names."""
    words = (value,) if isinstance(value, str) else value or ()
    return tuple(part.strip() for word in words for part in str(word).split(",") if part.strip())


def _decimals(value: Any) -> Any:
    """Split one, several, or a text with commas into numbers."""
    words = (value,) if isinstance(value, str | int | float) else value or ()
    return tuple(part for word in words for part in (word.split(",") if isinstance(word, str) else (word,)) if part)


Words = Annotated[tuple[str, ...], BeforeValidator(_words)]
Decimals = Annotated[tuple[PositiveFloat, ...], BeforeValidator(_decimals)]


TruthValue = Literal["loss", "margin"]


def _one_or_several(value: Any) -> Any:
    return (value,) if isinstance(value, str | Path) else value


Paths = Annotated[tuple[Path, ...], BeforeValidator(_one_or_several)]


class ScoredSettings(QuestionSettings):
    """Whose scores are judged.

    Runs that are there (`--run`), methods to run now (`--methods`), or both.
    """

    repeatable: ClassVar[tuple[str, ...]] = ("run", "methods")

    out: Path = Field(description="Folder of the table as JSON, the figure, and the runs that are made for it.")
    run: Patterns = Field((), description="Run directories that `vestige attribute` left; may be repeated.")
    methods: Words = Field(
        (), description="Methods to run now, such as influence,grad-dot; their runs stay in OUT/runs."
    )
    index: Any = Field(None, description="Index for --methods, in place of the data; it may hold the model too.")
    model: Any = Field(None, description="Model for --methods and baselines.")
    data: Any = Field(None, description="The training data: JSONL, JSON, CSV, Parquet, `datasets` folder or hub id.")
    queries: Any = Field(None, description="The queries, as for `vestige attribute`.")
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

    bank: Path = Field(description="Bank of models trained on random subsets, made by `vestige bank`.")
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

    bank: Path = Field(description="Bank made with `vestige bank --leave-source-out` (or other lists left out).")


class RemovalSettings(ScoredSettings, MemberSettings):
    """What do the queries lose when the models are retrained without the top examples? Curves by method."""

    repeatable: ClassVar[tuple[str, ...]] = (*ScoredSettings.repeatable, "rows")

    rows: Paths = Field(
        (),
        description="Leave out just the rows that a file lists, against random lists of equal size: an id on each "
        "line, a report's row list, CSV or JSONL, or a folder of `vestige select`; may be repeated.",
    )
    remove: Numbers = Field((10, 20, 40), description="Of each method, how many examples are left out, such as 10,20.")
    random_lists: PositiveInt = Field(3, description="Random lists of each length.")
    seeds: PositiveInt = Field(2, description="Retrained models for each list.")
    start: Any = Field(None, description="Model that each training begins from. Not given: --model.")

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
    """Do different queries and methods name different examples? Overlap of top lists and hub examples."""

    k: PositiveInt = Field(10, description="Length of the lists; runs keep 20 unless more were requested.")
