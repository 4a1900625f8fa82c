"""What `vestige select` takes."""

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveFloat, model_validator

from vestige.errors import SpecError
from vestige.settings._base import BAD_TEXT, OnBadText, OnlyWith, Settings

Strategy = Literal["top", "per-target", "round-robin", "gumbel", "random", "diverse"]
Unit = Literal["examples", "percent", "tokens"]

BY_SCORE = ("top", "per-target", "round-robin", "gumbel")
"""Strategies that are nothing without scores."""

_BUDGET = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(%|tokens?|examples?)?\s*", re.IGNORECASE)
_UNITS: dict[str, Unit] = {"%": "percent", "token": "tokens", "example": "examples", "": "examples"}
_BUDGET_WORDS = "a share such as 5%, a number of examples such as 500, or of tokens such as '20000 tokens'"


class Amount(NamedTuple):
    """How much to choose."""

    number: float
    unit: Unit


def parse_budget(text: str) -> Amount:
    """Parse an amount such as "5%", "500" or "20000 tokens".

    Raises:
        ValueError: It is none of these, nothing, more than everything, or half an example.
    """
    match = _BUDGET.fullmatch(text)
    if match is None:
        raise ValueError(_BUDGET_WORDS)
    number, unit = float(match[1]), _UNITS[(match[2] or "").lower().removesuffix("s")]
    if number <= 0 or (unit == "percent" and number > 100):
        raise ValueError(f"{_BUDGET_WORDS}; more than nothing, and no more than 100%")
    if unit != "percent" and not number.is_integer():
        raise ValueError(f"{_BUDGET_WORDS}; a share of everything is written {100 * min(number, 1):g}%")
    return Amount(number, unit)


def _budget(value: Any) -> str:
    amount = parse_budget(str(value))
    suffix = {"percent": "%", "tokens": " tokens", "examples": ""}[amount.unit]
    return f"{amount.number:.15g}{suffix}"


class SelectSettings(Settings):
    """What `vestige select` takes."""

    never_repeated: ClassVar[tuple[str, ...]] = ("overwrite",)
    only_with: ClassVar[OnlyWith] = {"temperature": ("strategy", ("gumbel",))}

    budget: Annotated[Any, BeforeValidator(_budget)] = Field(
        description="How much to choose: a share such as 5%, a number of examples, or '20000 tokens'."
    )
    out: Path = Field(description="Folder of the chosen data: selected.jsonl, selected.parquet and selection.json.")
    scores: Path | None = Field(None, description="Run directory that `vestige attribute` left, best with --dense.")
    strategy: Strategy = Field(
        "top",
        description="top: highest mean score over all queries; per-target: highest score for any one target, as LESS "
        "does; round-robin: each query takes its best in turn; gumbel: a draw that favours high scores; random: "
        "ignores the scores; diverse: what represents all gradients best (facility location).",
    )
    index: Path | None = Field(None, description="Index of the same data: for diverse, --duplicates and tokens.")
    data: Any = Field(None, description="The data to choose from. Not given: what the run or the index was made of.")
    queries: Any = Field(None, description="Queries with the column of --targets. Not given: those of the run.")
    on_bad_text: OnBadText = Field("refuse", description=BAD_TEXT)
    targets: str | None = Field(
        None,
        description="per-target: column of the queries, such as source, whose values are the targets; scores are "
        "averaged over a target's queries. Not given: every query is a target.",
    )
    temperature: PositiveFloat = Field(
        1.0, description="gumbel: in standard deviations of the scores; small ones take the top, large ones any."
    )
    min_score: float | None = Field(
        None, description="Never choose an example with a lower score: 0 leaves out those that do harm."
    )
    drop: Path | None = Field(
        None,
        description="Never choose these rows: a file with an id on each line, a report's row list, CSV or JSONL, or a "
        "folder of `vestige select` or `vestige data clean`.",
    )
    duplicates: float | None = Field(
        None, gt=0, le=1, description="Leave out examples whose gradient has at least this cosine with a chosen one's."
    )
    pool: float | None = Field(
        None, ge=1, description="diverse: choose among the best by score, N times the budget. Not given: all."
    )
    tokenizer: Any = Field(None, description="Hub id or folder of the tokenizer that a budget of tokens counts with.")
    seed: NonNegativeInt = Field(0, description="Seed of random choices, and of the order of examples that are equal.")
    overwrite: bool = Field(False, description="Replace a selection that is already there.")

    @property
    def amount(self) -> Amount:
        """The budget as a number and its unit."""
        return parse_budget(self.budget)

    @model_validator(mode="after")
    def _settings_fit(self) -> Self:
        if self.scores is None:
            if self.strategy in BY_SCORE:
                raise SpecError(f"--strategy {self.strategy} needs --scores RUN, made by `vestige attribute --dense`.")
            if self.min_score is not None or self.pool is not None:
                raise SpecError("--min-score and --pool are about scores: give --scores RUN.")
            if self.data is None and self.index is None:
                raise SpecError("Nothing to choose from: give --scores RUN, --index IDX or --data D.")
        if self.index is None and (self.strategy == "diverse" or self.duplicates is not None):
            what = "--strategy diverse" if self.strategy == "diverse" else "--duplicates"
            raise SpecError(f"{what} compares gradients. Give --index IDX, made by `vestige index` of the same data.")
        if self.targets is not None and self.strategy != "per-target":
            raise SpecError(f"--targets is for --strategy per-target; {self.strategy} has no targets.")
        if self.pool is not None and self.strategy != "diverse":
            raise SpecError(f"--pool is for --strategy diverse; {self.strategy} needs none.")
        return self
