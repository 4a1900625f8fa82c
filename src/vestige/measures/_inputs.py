"""What measures are given: one forward pass, losses, hidden states, a bank, or a model that continues texts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vestige.data import TokenizedData
from vestige.measures._tokens import TokenScores
from vestige.settings import AuditSettings

Column = Float[np.ndarray, "example"]
Continue = Callable[[Int[Tensor, "example prefix"], int], Int[Tensor, "example token"]]
"""From prefixes of one length and a number of tokens to the tokens that the model puts after each."""


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
    """What one forward pass says of some examples; position t predicts the token at position t + 1."""

    scores: TokenScores
    answer: Bool[Tensor, "example token"]
    """True at the positions that predict a token of the answer."""
    choices: ChoiceLogits

    def of_choices(self, compute: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Float[Tensor, "example"]:
        """Return `compute(logits, right, offered)` of the examples with choices, NaN for the others."""
        found = torch.full((len(self.answer),), torch.nan, dtype=torch.float64)
        if len(self.choices.examples):
            found[self.choices.examples] = compute(*self.choices[1:])
        return found


class Generation(NamedTuple):
    """Texts of a batch, and the model that continues them."""

    texts: Sequence[Int[np.ndarray, "token"]]
    generate: Continue
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
    tokenizer: Any

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
    """What the models of a bank make of its examples; values rise as an example is known better."""

    values: Float[np.ndarray, "member example"]
    membership: Bool[np.ndarray, "member example"]
    """True where the member was trained on the example or on a copy of it."""
    subsets: Int[np.ndarray, "member"]
    target: Column
    """Under the model that is measured; NaN for an example that is not in the data."""
    left_out: Bool[np.ndarray, "member"] | None
    """Members that must not judge the model."""
