"""Memorization measures by name: the built-in ones, and those that other packages announce."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from vestige.errors import SpecError
from vestige.registry import Registry
from vestige.runs import Truth, low_stands_out
from vestige.settings import AuditSettings
from vestige.terminal import lines_of_facts

if TYPE_CHECKING:
    from rich.table import Table

    from vestige.measures._job import AuditJob

Compute = TypeVar("Compute", bound=Callable[..., Any])
Sign = Literal[-1, 0, 1]
Stage = Literal["pass", "losses", "generation", "states", "weights", "each model and the bank", "bank"]
"""When a measure is computed, which decides what it is given:

    pass                      `Batch`, once for every batch of every model
    losses                    `Losses`, once for every model, after its passes
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
    "generation",
    "weights",
    "bank",
]

_GIVEN: dict[str, tuple[str, str]] = {
    "bank": ("bank", "compares with models that were not trained on the example: give --bank BANK."),
    "reference model": ("reference_model", "compares with another model: give it as --reference-model."),
}
"""The setting that a need takes, and what to type."""

NOT_DRAWN = 1000


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
    by_default: bool = True
    """False for one that takes time and is measured only when it is named."""
    missing: "str | Callable[[AuditJob], str]" = "no target token, or a value that is not finite"
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
        if other := [
            name for name in columns if name != self.name and not name.startswith((f"{self.name}_", "layer:"))
        ]:
            raise SpecError(
                f"The measure {self.name!r} returned a column {other[0]!r}, expected {self.name!r} or names that begin "
                f"with '{self.name}_'. Correct or uninstall it."
            )
        return columns


MEASURES: Registry[Measure] = Registry("vestige.measures", "measure", Measure)


def measure(name: str, meaning: str, **facts: Any) -> Callable[[Compute], Compute]:
    """Make a function known as the computation of the measure `name`; for the facts see `Measure`.

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


def requested_measures(settings: AuditSettings) -> tuple[Measure, ...]:
    """Return the measures that an audit computes, in their order; loss, and what a bank compares, are among them.

    Raises:
        SpecError: There is no measure of a name, or one lacks what it needs.
    """
    known = set(MEASURES.names())
    if unknown := [name for name in settings.measures if name not in known | {"default", "all"}]:
        names = ", ".join(each.name for each in all_measures())
        raise SpecError(f"No measure is called {unknown[0]!r}. There are: default, all, {names}.")
    found = []
    for each in all_measures():
        named = each.name in settings.measures
        lacking = [_GIVEN[need] for need in each.needs if need in _GIVEN]
        lacking = [words for field, words in lacking if getattr(settings, field) is None]
        if named and lacking:
            raise SpecError(f"{each.name} {lacking[0]}")
        chosen = named or "all" in settings.measures or ("default" in settings.measures and each.by_default)
        if each.name == "loss" or (each.name == "token_gap" and settings.bank is not None):
            chosen = True
        if chosen and not lacking:
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
    """Return everything that a measure says of itself.

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
