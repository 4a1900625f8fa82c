"""The settings of the commands that prepare rows, or read an index or a run: data, select, report, status, export."""

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from vestige.errors import SpecError
from vestige.settings._base import BAD_TEXT, Basic, Common, Input, Named, OnBadText, OnlyWith, Settings
from vestige.settings._shared import (
    WHERE,
    DataName,
    IndexFolder,
    Options,
    QueriesName,
    ResultFolder,
    RunFolder,
    TokenizerName,
)

SplitBy = Literal["example", "source", "stratified"]
Strategy = Literal["top", "per-target", "round-robin", "gumbel", "random", "diverse"]
Unit = Literal["examples", "percent", "tokens"]

BY_SCORE = ("top", "per-target", "round-robin", "gumbel")
"""Strategies that are nothing without scores."""

_BUDGET = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(%|tokens?|examples?)?\s*", re.IGNORECASE)
_UNITS: dict[str, Unit] = {"%": "percent", "token": "tokens", "example": "examples", "": "examples"}
_BUDGET_WORDS = "a share such as 5%, a number of examples such as 500, or of tokens such as '20000 tokens'"


class PreparationSettings(Settings):
    """Rows in, rows out."""

    data: DataName = Field(description="The rows: any data file, folder or hub id that Vestige reads.")
    out: Common[Path] = Field(
        description="Folder of the result: data.jsonl, the same as a `datasets` folder, and a record."
    )
    limit: PositiveInt | None = Field(None, description="Use only the first N rows.")
    where: Options = Field({}, description=WHERE)
    on_bad_text: OnBadText = Field("refuse", description=BAD_TEXT)
    push_to_hub: str | None = Field(None, description="Also upload the result to the hub, as owner/name.")
    private: bool = Field(True, description="With --push-to-hub: only its owner sees it.")
    overwrite: bool = Field(
        False, description="Replace a result that other settings made. Replies that were paid for stay."
    )

    @property
    def reading(self) -> dict[str, Any]:
        """The arguments of `load_examples` that say which rows are read, and how."""
        return {"limit": self.limit, "where": self.where, "on_bad_text": self.on_bad_text}


def _shares(value: Any) -> Any:
    """Return words such as "train=0.8" in one form, checked."""
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

    parts: Annotated[tuple[str, ...], BeforeValidator(_shares), Basic()] = Field(
        ("train=0.5", "test=0.5"), description="Names of the parts and their shares, such as train=0.8 test=0.2."
    )
    by: Common[SplitBy] = Field(
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
    """Turn rows into tokens once, as a file of `input_ids` and `labels` that every command reads."""

    tokenizer: Common[TokenizerName] = Field(
        description="Hub id or folder of the tokenizer, or of the model that it lies beside."
    )
    max_length: PositiveInt | None = Field(None, description="Cut rows after this many tokens. Not given: cut nothing.")
    chat: bool = Field(False, description="Put prompt and completion into the tokenizer's chat template.")
    split: str | None = Field(None, description="Split of a hub id or of a saved `DatasetDict`.")
    block_size: Common[PositiveInt | None] = Field(
        None,
        ge=2,
        description="Join the rows with an end token behind each, and cut them into rows of N tokens. A block's column "
        "`sources` says where its tokens are from.",
    )
    workers: PositiveInt = Field(1, description="Processes that read and encode large data.")

    @model_validator(mode="after")
    def _rows_are_whole(self) -> Self:
        if self.block_size is not None and self.max_length is not None:
            raise SpecError("--block-size keeps every token of a row, and --max-length cuts rows. Drop one of them.")
        return self


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

    only_with: ClassVar[OnlyWith] = {
        "temperature": ("strategy", ("gumbel",)),
        "targets": ("strategy", ("per-target",)),
        "pool": ("strategy", ("diverse",)),
    }

    budget: Annotated[Any, BeforeValidator(_budget)] = Field(
        description="How much to choose: a share such as 5%, a number of examples, or '20000 tokens'."
    )
    out: Common[Path] = Field(
        description="Folder of the chosen data: selected.jsonl, selected.parquet and selection.json."
    )
    scores: RunFolder[Path | None] = Field(
        None, description="Run directory that `vestige attribute` left, best with --dense."
    )
    strategy: Common[Strategy] = Field(
        "top",
        description="top: highest mean score over all queries; per-target: highest score for any one target, as LESS "
        "does; round-robin: each query takes its best in turn; gumbel: a draw that favours high scores; random: "
        "ignores the scores; diverse: what represents all gradients best (facility location).",
    )
    index: IndexFolder[Path | None] = Field(
        None, description="Index of the same data: for diverse, --duplicates and tokens."
    )
    data: DataName = Field(
        None, description="The data to choose from. Not given: what the run or the index was made of."
    )
    queries: QueriesName = Field(None, description="Queries with the column of --targets. Not given: those of the run.")
    on_bad_text: OnBadText = Field("refuse", description=BAD_TEXT)
    targets: str | None = Field(
        None,
        description="per-target: column of the queries, such as source, whose values are the targets; scores are "
        "averaged over a target's queries. Not given: every query is a target.",
    )
    temperature: PositiveFloat = Field(
        1.0, description="gumbel: in standard deviations of the scores; small ones take the top, large ones any."
    )
    min_score: Common[float | None] = Field(
        None, description="Never choose an example with a lower score: 0 leaves out those that do harm."
    )
    drop: Annotated[Path | None, Basic(), Input("vestige.data:require_row_list")] = Field(
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
    tokenizer: TokenizerName = Field(
        None, description="Hub id or folder of the tokenizer that counts a budget of tokens."
    )
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
        return self


class DemoSettings(Settings):
    """What `vestige demo` takes."""

    out: Path = Field(
        Path("demo-run"), description="Folder to copy the example into; a copy that is there already is used again."
    )
    open: bool = Field(False, description="Also open the page in the browser.")


class ReportSettings(Settings):
    """What `vestige report` takes."""

    positional: ClassVar[tuple[str, ...]] = ("run",)
    run: Annotated[ResultFolder[Path], Input("vestige.reports:require_page")] = Field(
        description="Folder of a run made by `vestige attribute`, `untrac`, `audit`, `fix` or `evaluate components`."
    )
    out: Common[Path | None] = Field(None, description="The HTML file to write. Not given: report.html in the run.")
    compare: Common[Path | None] = Field(
        None, description="Another run of the same data and queries, to be shown beside it: by another method, say."
    )


class ViewSettings(Settings):
    """What `vestige view` takes."""

    positional: ClassVar[tuple[str, ...]] = ("folder",)
    folder: ResultFolder[Path] = Field(
        description="A folder with runs, indexes, trainings and other results in it or below it; or one of them."
    )
    index: Common[IndexFolder[Path | None]] = Field(
        None, description="An index in that folder, whose model is loaded at once, to be asked in the browser."
    )
    port: Common[int] = Field(0, ge=0, le=65535, description="Port on this computer; 0 takes a free one.")


class StatusSettings(Settings):
    """What `vestige status` takes."""

    positional: ClassVar[tuple[str, ...]] = ("path",)
    path: ResultFolder[Path] = Field(description="Folder of an index, a run or a sweep, finished or in the making.")
    watch: Common[bool] = Field(False, description="Show it again every two seconds, until the work is over or Ctrl-C.")
    verify: Common[bool] = Field(
        False, description="Compare every file of an index, a run or an audit with its sha256, and list them."
    )


class CancelSettings(Settings):
    """What `vestige cancel` takes."""

    positional: ClassVar[tuple[str, ...]] = ("path",)
    path: Path = Field(description="Folder of an index, a run or a sweep in the making.")


class MeasuresSettings(Settings):
    """The settings of `vestige measures`."""

    positional: ClassVar[tuple[str, ...]] = ("name",)
    name: Annotated[str | None, Basic(), Named("vestige.measures", "measure")] = Field(
        None, description="A measure, to print everything about it. Not given: list all."
    )


class MethodsSettings(Settings):
    """The settings of `vestige methods`."""

    positional: ClassVar[tuple[str, ...]] = ("name",)
    name: Annotated[str | None, Basic(), Named("vestige.methods", "method")] = Field(
        None, description="A method, to print everything about it. Not given: list all."
    )


class CompletionSettings(Settings):
    """What `vestige completion` takes."""

    positional: ClassVar[tuple[str, ...]] = ("shell",)
    shell: Literal["bash", "zsh", "fish"] = Field(description="The shell whose completion is printed.")


class ExportSettings(Settings):
    """What `vestige export` takes."""

    positional: ClassVar[tuple[str, ...]] = ("path",)
    only_with: ClassVar[OnlyWith] = {"private": ("push_to_hub", ()), "texts": ("push_to_hub", ())}
    path: ResultFolder[Path] = Field(description="Folder of an index, of a run or of an audit.")
    out: Common[Path | None] = Field(None, description="Folder to write into, new or empty.")
    to: Common[str] = Field("numpy", description="Format: a name from the list above, for what lies at PATH.")
    push_to_hub: Common[str | None] = Field(
        None,
        description="Upload PATH as it is to a data set of the hub, owner/name; others then read it as hub:owner/name.",
    )
    private: bool = Field(True, description="With --push-to-hub: only its owner sees it.")
    texts: bool = Field(True, description="With --push-to-hub: also what data and queries say.")

    @model_validator(mode="after")
    def _goes_somewhere(self) -> Self:
        if self.out is None and self.push_to_hub is None:
            raise SpecError("`out` is missing: type --out FOLDER, or --push-to-hub owner/name.")
        return self
