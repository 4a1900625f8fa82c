"""What `vestige evaluate components` takes."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt, field_validator

from vestige.settings._shared import LaunchSettings, Patterns, QuestionSettings


def _words(value: Any) -> Any:
    """Split one, several, or a text with commas into words."""
    words = (value,) if isinstance(value, str | int) else value or ()
    return tuple(part.strip() for word in words for part in str(word).split(",") if part.strip())


Words = Annotated[tuple[str, ...], BeforeValidator(_words)]


class ComponentsSettings(QuestionSettings, LaunchSettings):
    """Which components suffice? Accuracy and agreement of each, and of sets chosen on other queries.

    Queries are paraphrases of training examples, or answers to them, and carry the id of their original. Each distinct
    gradient is computed once; full gradient, every set of components, projections and layer outputs follow from its
    products. Interrupted at any moment, the same command continues.
    """

    model: Any = Field(description="The model: hub id, local folder, GGUF folder or PEFT adapter folder.")
    data: Any = Field(description="The originals: JSONL, JSON, CSV, Parquet, `datasets` folder or hub id.")
    queries: Any = Field(description="The paraphrases, with answers, and with the id of the original of each.")
    out: Path = Field(description="Folder of the products, the table, the figures and the chosen components.")
    truth: str = Field("original_id", description="Column of the queries that holds the id of the original.")
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

    repeatable: ClassVar[tuple[str, ...]] = ("project", "candidates")

    @field_validator("candidates")
    @classmethod
    def _candidates_are_known(cls, candidates: tuple[str, ...]) -> tuple[str, ...]:
        numbers = [word for word in candidates if word.isdigit() and int(word) > 0]
        if not candidates or len(numbers) + candidates.count("all") + candidates.count("given") < len(candidates):
            raise ValueError("numbers such as 5, all, or given")
        return tuple(dict.fromkeys(candidates))
