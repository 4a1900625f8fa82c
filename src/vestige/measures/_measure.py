"""What a measure is and what it is given; the built-in ones and those of other packages, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, TypeVar

import numpy as np
from jaxtyping import Bool, Float, Int

from vestige.data import NO_TARGET, TokenizedData
from vestige.errors import DataError, SpecError
from vestige.lazy import torch
from vestige.registry import Registry, require_name
from vestige.runs import Truth, low_stands_out
from vestige.settings import AuditSettings, BankValue
from vestige.terminal import lines_of_facts

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor

Column = Float[np.ndarray, "example"]
PerExample: TypeAlias = "Float[Tensor, 'example']"
PerToken: TypeAlias = "Float[Tensor, 'example token']"
TokenMask: TypeAlias = "Bool[Tensor, 'example token']"
Continue: TypeAlias = "Callable[[Int[Tensor, 'example prefix'], int], Int[Tensor, 'example token']]"
"""From prefixes of one length and a number of tokens to the tokens that the model puts after each."""

Compute = TypeVar("Compute", bound=Callable[..., Any])
Sign = Literal[-1, 0, 1]
Predict: TypeAlias = "Callable[[Int[Tensor, 'example token'], int], Float[Tensor, 'example token vocabulary']]"
"""From token ids and n to the logits from which the model predicts the last n of them."""

Stage = Literal["pass", "losses", "checkpoints", "generation", "states", "weights", "each model and the bank", "bank"]
"""When a measure is computed, which decides what it is given:

    pass                      `Batch`, once for every batch of every model
    losses                    `Losses`, once for every model, after its passes
    checkpoints               the mean losses of all models, [checkpoint, example], nats; its values stand beside the
                              model under audit, which is the last
    generation                `Generation`, once for every batch of every model
    states                    `States`, once for every model and layer
    weights                   `AuditJob`, once for all models
    each model and the bank   `BankValues` with the values of one model, once for every model
    bank                      `BankValues` without them, once; its values stand beside the model under audit
"""
Need = Literal[
    "token scores",
    "answer",
    "choices",
    "hidden states",
    "classes",
    "tokenizer",
    "reference model",
    "holdout",
    "checkpoints",
    "generation",
    "weights",
    "bank",
]

_GIVEN: dict[str, tuple[str, str]] = {
    "bank": ("bank", "compares with models that were not trained on the example: give --bank BANK."),
    "reference model": ("reference_model", "compares with another model: give it as --reference-model."),
    "holdout": ("holdout", "learns from examples that were not trained on: give --holdout FILE."),
    "checkpoints": ("checkpoints", "compares states of one training: give --checkpoints RUN."),
}
"""The setting that a need takes, and what to type."""

NOT_DRAWN = 1000
TOTAL_LOSS = "total_loss"
"""Column of every pass: the loss summed over target tokens."""
BLIND = "blind"
"""Of a judgement: what texts alone give away."""


class TokenScores(NamedTuple):
    """Log-probabilities of target tokens, and how they compare with the other tokens at their position."""

    log_probability: PerToken
    """Of the target, nats, float64; 0 where there is no target."""
    standardised: PerToken
    """(log p - mean) / deviation of log p over the vocabulary, each token weighted by its probability."""
    gap: PerToken
    """Logit of the target minus the largest other one; above 0 for a target that is the likeliest token."""
    wanted: TokenMask
    """Where there is a target."""


def token_scores(
    logits: Float[Tensor, "example token vocabulary"], labels: Int[Tensor, "example token"]
) -> TokenScores:
    """Compute log-probabilities of targets and how they stand among the other tokens, float64.

    Args:
        logits: At position t, of the token that `labels` names at position t: shifted already.
        labels: Tokens to predict, -100 where there is none.

    Raises:
        DataError: Shapes that do not agree.
    """
    if logits.shape[:2] != labels.shape:
        raise DataError(f"Logits {tuple(logits.shape)} and labels {tuple(labels.shape)} differ in examples or tokens.")
    wanted = labels != NO_TARGET
    logits, positions = logits.double(), labels.clamp(min=0)[..., None]
    gap = (logits.gather(-1, positions) - logits.scatter(-1, positions, -torch.inf).amax(-1, keepdim=True))[..., 0]
    chances = torch.log_softmax(logits, dim=-1)
    target = chances.gather(-1, positions)[..., 0]
    weights = chances.exp()
    # A token that is ruled out has log-probability minus infinity and weight 0: no part of the mean.
    finite = torch.where(weights > 0, chances, 0.0)
    mean = (weights * finite).sum(-1)
    spread = (weights * (finite - mean[..., None]).square()).sum(-1).sqrt()
    # Where all tokens are equally likely nothing sets the target apart.
    standard = torch.where(spread > 1e-12, (target - mean) / spread.clamp(min=1e-12), 0.0)
    target, standard, gap = (torch.where(wanted, values, 0.0) for values in (target, standard, gap))
    return TokenScores(target, standard, gap, wanted)


class ChoiceLogits(NamedTuple):
    """Logits of the possible answers at the token at which they part, of the examples of a batch that have choices."""

    examples: Int[np.ndarray, "some"]
    """Their positions in the batch."""
    logits: Float[Tensor, "some choice"]
    right: Int[Tensor, "some"]
    """Number of the choice that the training label names."""
    offered: Bool[Tensor, "some choice"]
    """False for padding."""


class Batch(NamedTuple):
    """What one forward pass computes of some examples; position t predicts the token at position t + 1."""

    scores: TokenScores
    answer: TokenMask
    """True at the positions that predict a token of the answer."""
    choices: ChoiceLogits

    def of_choices(self, compute: Callable[[Tensor, Tensor, Tensor], Tensor]) -> PerExample:
        """Return `compute(logits, right, offered)` of the examples with choices, NaN for the others."""
        found = torch.full((len(self.answer),), torch.nan, dtype=torch.float64)
        if len(self.choices.examples):
            found[self.choices.examples] = compute(*self.choices[1:])
        return found


class Generation(NamedTuple):
    """Texts of a batch, and the model that continues them."""

    texts: Sequence[Int[np.ndarray, "token"]]
    generate: Continue
    predict: Predict
    settings: AuditSettings


@dataclass(frozen=True)
class Losses:
    """Losses of all examples under one model, nats; NaN where they have no target."""

    mean: Column
    total: Column
    """Summed over target tokens."""
    reference_total: Column | None
    """The same of the reference model, by its own tokens; NaN for an example that was cut off."""
    data: TokenizedData
    held_out: Bool[np.ndarray, "example"]
    tokenizer: Any
    settings: AuditSettings

    @property
    def targets(self) -> Column:
        """Number of target tokens of each example, NaN where there are none."""
        return np.where(self.data.target_counts > 0, self.data.target_counts, np.nan)

    @cached_property
    def texts(self) -> list[str] | None:
        """The predicted tokens of each example as text; None for a model without tokenizer."""
        if self.tokenizer is None:
            return None
        predicted = [ids[mask].tolist() for ids, mask in zip(self.data.input_ids, self.data.targets, strict=True)]
        return self.tokenizer.batch_decode(predicted)


@dataclass(frozen=True)
class States:
    """Hidden states of all examples at one layer of one model."""

    values: Float[np.ndarray, "example hidden"]
    held_out: Bool[np.ndarray, "example"]
    classes: Int[np.ndarray, "example"]
    """-1 for an example without a class."""
    has_classes: bool
    settings: AuditSettings

    @cached_property
    def finite(self) -> Bool[np.ndarray, "example"]:
        """Examples whose states are numbers."""
        return np.asarray(np.isfinite(self.values).all(1))

    @cached_property
    def own(self) -> Bool[np.ndarray, "example"]:
        """The data's own examples: what anything is fitted on."""
        return self.finite & ~self.held_out

    @cached_property
    def classed(self) -> Bool[np.ndarray, "example"]:
        """The data's own examples that have a class; none where no class has two of them."""
        chosen = self.own & (self.classes >= 0)
        some = self.has_classes and chosen.any() and np.bincount(self.classes[chosen]).max() > 1
        return chosen if some else np.zeros_like(chosen)

    def spread(self, values: Column, chosen: Bool[np.ndarray, "example"]) -> Column:
        """Return values of the chosen examples as a column of all, NaN for the others."""
        found = np.full(len(self.values), np.nan)
        found[chosen] = values
        return found


class BankValues(NamedTuple):
    """What the models of a bank make of its examples; values rise as an example is learned better."""

    values: Float[np.ndarray, "member example"]
    membership: Bool[np.ndarray, "member example"]
    """True where the member was trained on the example or on a copy of it."""
    subsets: Int[np.ndarray, "member"]
    target: Column
    """Under the model that is measured; NaN for an example that is not in the data."""
    left_out: Bool[np.ndarray, "member"] | None
    """Members that must not judge the model."""
    of: BankValue
    """What the values are: margins, gaps, or losses with their sign turned."""


class Rule(NamedTuple):
    """A threshold that needs no tuning, and whom it finds: members, or examples at risk."""

    threshold: float
    finds: Literal["members", "at risk"]


@dataclass(frozen=True)
class Measure:
    """A measure: how to compute it, and every fact that settings, help, records, judgement and figures take from it.

    `compute` is given what its stage has and returns a value for each example, NaN where there is none; or a dictionary
    of columns: its own name, and details as `name_detail`, which are stored and not judged.
    """

    name: str
    """The name of its column, with underscores."""
    meaning: str
    """What it is, in a few words without a full stop."""
    compute: Callable[..., Any]
    stage: Stage = "pass"
    needs: tuple[Need, ...] = ("token scores",)
    of: Literal["example", "layer", "checkpoint"] = "example"
    """What a value belongs to; only those of examples are columns of the evidence."""
    sign: Sign = 0
    """1 where high values show that the model has memorized an example, -1 where low ones do, 0 where neither does."""
    early_sign: Sign | None = None
    """The same for what *will* be memorized, at an early checkpoint: hard or atypical examples. None: minus `sign`."""
    high: str = ""
    """What a high value says, where `sign` does not say it."""
    details: tuple[str, ...] = ()
    """Order of its columns `name_X`, by X; others follow, the shorter first."""
    detail: str = ""
    """What `name_X` is beside the meaning, with {} for X; without it such columns are not described."""
    since_first: bool = False
    """Whether its change since the first checkpoint, at the same layer, is a detail `slope` of it; for states alone."""
    relative: bool = False
    """Whether an example's value depends on other examples, so that values are not independent of one another."""
    word_for_word: str = ""
    """How a text comes back for which the value is 1, in a clause; empty for a measure that does not say so."""
    summary: Callable[[dict[str, Column], AuditSettings], list[str]] | None = None
    """From its columns, of the data's own examples under the model, to sentences for the notes of the run."""
    by_default: bool = True
    """False for one that takes time and is measured only when it is named."""
    missing: str | Callable[[Any], str] = "no target token, or a value that is not finite"
    """Why examples have no value, beside what it needs."""
    cost: str = "nothing beside the forward pass"
    limits: str = "evidence about an example, no verdict"
    rule: Rule | None = None
    order: int = 1000
    """Position among the measures."""
    curve: int = NOT_DRAWN
    """Position among the ROC curves, of which the first seven are drawn."""
    over_time: bool = False
    """Whether the figure over checkpoints shows it."""

    @property
    def says(self) -> str:
        """The meaning of a high value, as runs record it."""
        return self.high or {1: "memorized", -1: "not memorized", 0: ""}[self.sign]

    def sign_for(self, truth: Truth) -> Sign:
        """Return 1 where high values are flagged, -1 where low ones are, 0 where it says nothing about this truth.

        Members are what a model has learned; flagged and memorized examples are those at risk, which are hard or
        atypical before they are memorized.
        """
        early: Any = -self.sign if self.early_sign is None else self.early_sign
        return self.sign if truth == "membership" else early

    def columns(self, found: Any) -> dict[str, Any]:
        """Return what was computed by name of the column; what is known of a whole layer is named "layer:X".

        Raises:
            SpecError: A column of another name, which would be lost.
        """
        columns = found if isinstance(found, dict) else {self.name: found}
        allowed = (f"{self.name}_", "layer:")
        if other := [name for name in columns if name != self.name and not name.startswith(allowed)]:
            raise SpecError(
                f"The measure {self.name!r} returned a column {other[0]!r}, expected {self.name!r} or names that begin "
                f"with '{self.name}_'. Correct or uninstall it."
            )
        return columns


MEASURES: Registry[Measure] = Registry("vestige.measures", "measure", Measure)


def measure(name: str, meaning: str, **facts: Any) -> Callable[[Compute], Compute]:
    """Register a function as the computation of the measure `name`; for the facts see `Measure`.

    Raises:
        SpecError: Another measure has that name.
    """

    def register(compute: Compute) -> Compute:
        MEASURES.add(name, Measure(name, meaning, compute, **facts))
        return compute

    return register


def all_measures() -> list[Measure]:
    """Return every measure in their order."""
    return sorted(MEASURES, key=lambda each: (each.order, each.name))


def choose_measures(settings: AuditSettings) -> tuple[Measure, ...]:
    """Return the measures that an audit computes, in their order; loss, and what a bank compares, are among them.

    Raises:
        SpecError: There is no measure of a name, or one lacks what it needs.
    """
    for name in settings.measures:
        require_name("vestige.measures", "measure", name, ("default", "all"))
    found = []
    for each in all_measures():
        needs = [_GIVEN[need] for need in each.needs if need in _GIVEN]
        lacking = [words for field, words in needs if getattr(settings, field) is None]
        named = each.name in settings.measures
        if named and lacking:
            raise SpecError(f"{each.name} {lacking[0]}")
        always = each.name == "loss" or (each.name == "token_gap" and settings.bank is not None)
        by_default = "all" in settings.measures or ("default" in settings.measures and each.by_default)
        if (named or always or by_default) and not lacking:
            found.append(each)
    if settings.choose_layer == "smi" and not any("classes" in each.needs for each in found):
        raise SpecError("--choose-layer smi is for psmi and mahalanobis: add psmi to --measures.")
    return tuple(found)


def measure_table() -> "Table":
    """Return a line for each measure: its name, what it is, what high values say, what it needs and costs."""
    from rich.table import Table

    table = Table("measure", "is", "high says", "needs", "costs")
    for each in all_measures():
        cost = each.cost if each.by_default else f"{each.cost}; only when named"
        table.add_row(each.name, each.meaning, each.says, ", ".join(each.needs), cost)
    return table


def describe_measure(name: str) -> str:
    """Return every fact of a measure as text.

    Raises:
        SpecError: There is no such measure.
    """
    found = MEASURES.find(name)
    early = found.sign_for("flag")
    at_risk = {1: "high values", -1: "low values", 0: "says nothing about it"}[early]
    facts = {
        "of": f"each {found.of}",
        "high says": found.says or "nothing by itself",
        "at risk": f"{at_risk} (from an early checkpoint: what will be memorized)" if early else at_risk,
        "lists begin with": "low values" if low_stands_out(found.says) else "high values",
        "needs": ", ".join(found.needs),
        "measured": "by default" if found.by_default else "only when named",
        "no value where": found.missing,
        "costs": found.cost,
        "limits": found.limits,
    }
    return "\n".join([f"{name}: {found.meaning}", "", *lines_of_facts(facts)])
