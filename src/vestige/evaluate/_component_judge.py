"""How well one way of comparing examples does, and what it costs: a row of the table."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from vestige.evaluate._component_products import credit
from vestige.evaluate._component_run import OnePassResult
from vestige.evaluate._component_search import agreement_estimate, grouped_estimate
from vestige.evaluate._statistics import Estimate
from vestige.settings import ComponentsSettings

FULL = "full gradient"
_BYTES = 4


class Representation(NamedTuple):
    """One way of comparing examples, and how well it does."""

    name: str
    accuracy: Estimate
    against_full: Estimate | None
    """Accuracy minus that of the full gradient, pair by pair of queries."""
    agreement: Estimate | None
    centred: Estimate | None
    parameters: float | None
    """Share of the parameters that take part."""
    backward: float | None
    """Share of a complete backward pass."""
    bytes: int | None
    """Of one example's vector, in float32."""
    seconds: float | None
    opponent: bool = False


class Judge:
    """Turns similarities into a row of the table."""

    def __init__(self, settings: ComponentsSettings, result: OnePassResult, words: str) -> None:
        self._settings, self._groups = settings, result.inputs.groups
        self.products = result.gradients[words]
        self.right, self.listed = result.inputs.candidates[words].right, self.products.listed
        self.full = self.products.cosine()
        self._full_credit = credit(self.full, self.right, self.listed)
        self._total = result.inputs.total_parameters

    def estimate(self, values: Float[np.ndarray, " query"]) -> Estimate:
        return grouped_estimate(values, self._groups, self._settings.draws, self._settings.seed)

    def agreements(self, scores: Float[np.ndarray, "query candidate"]) -> tuple[Estimate, Estimate]:
        draws, seed = self._settings.draws, self._settings.seed
        one, other = (
            agreement_estimate(scores, self.full, self.listed, self._groups, draws, seed, centred=centred)
            for centred in (False, True)
        )
        return one, other

    def row(
        self,
        name: str,
        scores: Float[np.ndarray, "query candidate"] | None,
        *,
        credits: Float[np.ndarray, " query"] | None = None,
        numbers: float | None = None,
        parameters: float | None = None,
        backward: float | None = None,
        seconds: float | None = None,
        opponent: bool = False,
    ) -> Representation:
        """Return the row; `numbers` is the length of one example's vector, `parameters` the gradients it is made of."""
        if credits is None:
            assert scores is not None
            credits = credit(scores, self.right, self.listed)
        alike, centred = (None, None) if scores is None else self.agreements(scores)
        return Representation(
            name,
            self.estimate(credits),
            None if name == FULL else self.estimate(credits - self._full_credit),
            alike,
            centred,
            None if parameters is None else parameters / self._total,
            backward,
            None if numbers is None else round(_BYTES * numbers),
            seconds,
            opponent,
        )
