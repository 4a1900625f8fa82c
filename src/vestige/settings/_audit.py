"""What `vestige audit` takes."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from vestige.errors import SpecError
from vestige.settings._base import Basic, Common, Input, Named, OnlyWith
from vestige.settings._shared import (
    BankFolder,
    DataName,
    LaunchSettings,
    ModelName,
    Patterns,
    QuestionSettings,
    one_or_several,
)

BankValue = Literal["margin", "gap", "loss"]
LayerChoice = Literal["last", "smi"]


WholeNumbers = Annotated[tuple[PositiveInt, ...], BeforeValidator(one_or_several)]


class AuditSettings(QuestionSettings, LaunchSettings):
    """What `vestige audit` takes."""

    repeatable: ClassVar[tuple[str, ...]] = ("checkpoints",)
    only_with: ClassVar[OnlyWith] = {
        "canary_references": ("canaries", ()),
        **dict.fromkeys(("bank_value", "memorized_at"), ("bank", ())),
        "pair_field": ("holdout", ()),
        **dict.fromkeys(("against_scores", "against_span", "against_near"), ("against", ())),
    }
    model: ModelName = Field(
        description="The model under audit: hub id, local folder, GGUF folder or PEFT adapter folder."
    )
    data: DataName = Field(description="The examples that it may have memorized, mostly its training data.")
    out: Common[Path] = Field(description="Folder of the run: evidence for every example, judgement and figures.")
    checkpoints: Annotated[Any, Basic(), Input("vestige.models:require_place")] = Field(
        None,
        description="Earlier states of the model, in the order of training: folders, or the folder of a Trainer's run.",
    )
    measures: Annotated[Patterns, Basic(), Named("vestige.measures", "measure", one_or_several, ("default", "all"))] = (
        Field(
            ("default",),
            description="What to measure: default, all, or names from `vestige measures`, such as loss psmi "
            "extraction; default leaves out those that take time.",
        )
    )
    reference_model: ModelName = Field(None, description="Another model, for the perplexity ratio.")
    bank: BankFolder[Path | None] = Field(None, description="A bank of models made by `vestige bank` on the same data.")
    bank_subset: NonNegativeInt | None = Field(
        None,
        description="The model was itself trained on this subset of the bank (its number): models of that subset are "
        "no judges, and membership is known.",
    )
    bank_value: BankValue = Field("margin", description="What of the bank's models is compared: margin, gap or loss.")
    holdout: DataName = Field(
        None, description="Examples of the same kind that are known not to be in the training data."
    )
    against: DataName = Field(
        None,
        description="A benchmark: which of its items stand in the data, verbatim or nearly, and what that does to the "
        "model's answers.",
    )
    against_scores: Annotated[Path | None, Input("vestige.runs:require_run")] = Field(
        None,
        description="Scores of the data for the benchmark's items, by `vestige attribute --queries BENCHMARK`: whether "
        "answers rest on the rows that were found.",
    )
    against_span: PositiveInt = Field(13, description="Words in a row that count as verbatim.")
    against_near: Annotated[float, Field(gt=0, le=1)] = Field(
        0.5, description="Similarity from which a row is a near copy of an item."
    )
    pair_field: str | None = Field(
        None,
        description="Column that links an example of the data with its twin in the holdout, such as pair: of the two "
        "it was drawn by chance which one is trained on. Usage is then inferred from pairs.",
    )
    flag: Common[str | None] = Field(
        None,
        description="Examples to be found, such as wrong labels: a column that marks them, its name or name=value, or "
        "a file that lists rows (ids on lines; a report's row list, CSV or JSONL; a selection).",
    )
    memorized_at: PositiveFloat = Field(
        4.0, description="With a bank: likelihood ratio (log) from which an example counts as memorized at the end."
    )
    layers: Patterns = Field(
        ("last",), description="Layers whose hidden states are measured: last, all, or numbers from 0 (embeddings)."
    )
    choose_layer: LayerChoice = Field(
        "last",
        description="Which of the layers is the main one: the last, or the one with most mutual information with the "
        "task's labels. Neither uses the flagged labels.",
    )
    label_field: str | None = Field(
        None,
        description="Column with the classes for PSMI, such as label. Not given: multiple-choice answers, else none.",
    )
    choices_field: str = Field(
        "choices", description="Column with the list of possible completions of a multiple-choice example."
    )
    directions: PositiveInt | None = Field(
        None, description="Random directions of PSMI. Not given: as many as the lowest values need."
    )
    dimensions: PositiveInt = Field(100, description="Principal axes of the Mahalanobis distance.")
    prefixes: WholeNumbers = Field((50,), description="Extraction: tokens that are given, several to compare.")
    continuation: PositiveInt = Field(50, description="Extraction: tokens that have to be given back.")
    tries: PositiveInt = Field(1000, description="Sampled extraction: samples of which one has to be the text.")
    chance: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5, description="Sampled extraction: the chance of that from which a text counts as discoverable."
    )
    top_k: NonNegativeInt = Field(
        40, description="Sampled extraction: likeliest tokens that are sampled from; 0 for all of them."
    )
    temperature: PositiveFloat = Field(1.0, description="Sampled extraction: temperature of the sampling.")
    canaries: Annotated[Any, Input("vestige.data:require_queries", each=False)] = Field(
        None,
        description="Secrets that were planted in the training data, to be measured by exposure: rows with prompt, "
        "completion (the secret) and a list of alternatives, or the alphabet that the secret was drawn from.",
    )
    canary_references: PositiveInt = Field(
        1023,
        description="Other secrets that each canary with an alphabet is compared with; 1023 measure up to 10 bits.",
    )
    seed: int = Field(0, description="Seed of directions, references and the blind baseline's folds.")
    overwrite: bool = Field(False, description="Replace a run that is already in the folder.")

    @model_validator(mode="after")
    def _settings_fit(self) -> Self:
        if self.bank_subset is not None and self.bank is None:
            raise SpecError("--bank-subset says which subset of --bank the model was trained on: give both.")
        if self.flag is not None and not self.flag.partition("=")[0].strip():
            raise SpecError(f"--flag {self.flag!r} names no column. Type --flag COLUMN, or --flag COLUMN=VALUE.")
        words = [word for word in self.layers if word not in ("last", "all") and not word.isdecimal()]
        if words or not self.layers:
            raise SpecError(f"--layers {' '.join(words) or '(nothing)'}: expected last, all, or numbers from 0.")
        return self
