"""What the rows of `vestige data` take that make or choose rows without a model."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt, model_validator

from vestige.errors import SpecError
from vestige.settings._base import OnlyWith
from vestige.settings._preparation import PreparationSettings

ChoiceFormat = Literal["auto", "arc", "mmlu", "ethics"]
SplitBy = Literal["example", "source", "stratified"]
CleanAction = Literal["drop", "deduplicate", "weight"]


class MultipleChoiceSettings(PreparationSettings):
    """Write questions with choices as prompts whose completion is the label of an answer.

    Ten ways of asking, drawn for each row; options, and noise in the labels that every later split shares.
    """

    format: ChoiceFormat = Field(
        "auto",
        description="Columns: arc (question, choices with text and label, answerKey), mmlu (question, choices, answer) "
        "or ethics (input, label); auto looks at each row.",
    )
    label_noise: float = Field(0.0, ge=0, le=1, description="Chance that a label is drawn anew, from all choices.")
    seed: NonNegativeInt = Field(0, description="Seed of the templates and of the noise, each by row.")
    split: str | None = Field(None, description="Split of a hub id or of a saved `DatasetDict`.")
    tokenizer: Any = Field(None, description="Of --max-length: hub id or folder of the model whose tokens are counted.")
    max_length: PositiveInt | None = Field(
        None,
        description="Tokens of a row. Longer ones lose the question's beginning, and keep options and answer.",
    )

    @model_validator(mode="after")
    def _length_is_counted(self) -> Self:
        if (self.tokenizer is None) != (self.max_length is None):
            raise SpecError("--tokenizer and --max-length go together: a length is counted in a model's tokens.")
        return self


def _shares(value: Any) -> Any:
    """Words such as "train=0.8" as a mapping of names to shares."""
    if isinstance(value, dict):
        pairs = list(value.items())
    else:
        words = value.replace(",", " ").split() if isinstance(value, str) else list(value)
        pairs = [tuple(str(word).partition("=")[::2]) for word in words]
    try:
        found = {str(name): float(share) for name, share in pairs}
    except (TypeError, ValueError):
        raise ValueError("parts with their shares, such as train=0.8 test=0.2") from None
    if len(found) != len(pairs):
        raise ValueError("each part once")
    return tuple(f"{name}={share:g}" for name, share in found.items())


class SplitSettings(PreparationSettings):
    """Divide rows at random into parts: a file for each, and one with all rows and the name of their part."""

    parts: Annotated[tuple[str, ...], BeforeValidator(_shares)] = Field(
        ("train=0.5", "test=0.5"), description="Names of the parts and their shares, such as train=0.8 test=0.2."
    )
    by: SplitBy = Field(
        "example",
        description="What is drawn: each example; each source, which stays whole; or examples, with every source in "
        "every part by its share (stratified).",
    )
    seed: NonNegativeInt = Field(0, description="Seed of the draw.")

    @property
    def shares(self) -> dict[str, float]:
        """Parts and their shares, in order."""
        return {name: float(share) for name, _, share in (word.partition("=") for word in self.parts)}

    @model_validator(mode="after")
    def _shares_fit(self) -> Self:
        shares = self.shares
        if not shares or min(shares.values()) <= 0 or sum(shares.values()) > 1 + 1e-9:
            raise SpecError(f"--parts {' '.join(self.parts)}: expected shares above 0 that add up to at most 1.")
        bad = [name for name in shares if not name.replace("-", "").replace("_", "").isalnum()]
        if bad or "data" in shares or "flagged" in shares:
            raise SpecError(f"--parts {' '.join(self.parts)}: name a part by letters and digits, not data or flagged.")
        return self


class TokenizeSettings(PreparationSettings):
    """Turn rows into tokens once, as a file of `input_ids` and `labels` that every verb reads."""

    tokenizer: Any = Field(description="Hub id or folder of the tokenizer, or of the model that it lies beside.")
    max_length: PositiveInt | None = Field(None, description="Cut rows after this many tokens. Not given: cut nothing.")
    chat: bool = Field(False, description="Put prompt and completion into the tokenizer's chat template.")
    split: str | None = Field(None, description="Split of a hub id or of a saved `DatasetDict`.")
    workers: PositiveInt = Field(1, description="Processes that read and encode large data.")


class CleanSettings(PreparationSettings):
    """Act on the examples that a training or an audit has flagged: drop, deduplicate or weigh them less.

    What is taken out is written beside what is left, each row with its reason: nothing is lost.
    """

    only_with: ClassVar[OnlyWith] = {"weight": ("action", ("weight",))}

    flagged: Path = Field(
        description="Which rows are flagged: a folder of `vestige train --alarm`, `vestige audit` or `vestige select`, "
        "or a file that lists rows: ids on lines, or a report's row list, CSV or JSONL."
    )
    action: CleanAction = Field(
        "drop",
        description="drop takes flagged rows out; deduplicate keeps one of equal texts among which one is flagged; "
        "weight adds a column `weight`.",
    )
    near: float | None = Field(
        None,
        gt=0,
        le=1,
        description="deduplicate: also texts that share this part of their word triples with a flagged one (0.7, say).",
    )
    weight: float = Field(0.1, ge=0, lt=1, description="weight: of flagged rows; the others have 1.")
    measure: str | None = Field(None, description="Of an audit: the measure that flags. Not given: its strongest one.")
    threshold: float | None = Field(None, description="Of an audit: flag values that are at least as telling as this.")
    quantile: float | None = Field(None, gt=0, lt=1, description="Of an audit: flag this share of the examples.")

    @model_validator(mode="after")
    def _rule_fits(self) -> Self:
        if self.threshold is not None and self.quantile is not None:
            raise SpecError("--threshold and --quantile both say whom to flag. Give one of them.")
        if self.near is not None and self.action != "deduplicate":
            raise SpecError("--near says which texts are copies: it goes with --action deduplicate.")
        return self
