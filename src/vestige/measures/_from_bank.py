"""Everything that a bank of models proves about its examples, in one go."""

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from vestige.banks import Bank
from vestige.measures._counterfactual import counterfactual, simplicity
from vestige.measures._lira import SHRINKAGE, GlobalLira, lira_global, lira_of_members


class BankEvidence(NamedTuple):
    """What the models of a bank say about each example, ids in the order of `Bank.example_ids`."""

    counterfactual: Float[np.ndarray, "example"]
    simplicity: Float[np.ndarray, "example"]
    lira: Float[np.ndarray, "member example"]
    """Of each member as the target, those of its subset left out."""
    success: GlobalLira
    uncomputable: int
    """Pairs of a member and an example that have no likelihood ratio."""


def bank_evidence(
    bank: Bank,
    *,
    of: Literal["margin", "gap", "loss"] = "margin",
    shrinkage: float = SHRINKAGE,
    membership: Bool[np.ndarray, "member example"] | None = None,
) -> BankEvidence:
    """Compute counterfactual memorization, simplicity and likelihood ratios of all examples of a bank.

    Args:
        bank: Of random subsets, with what each member makes of the examples.
        of: The value that they are taken from. Losses count with their sign turned, so that all of them rise.
        shrinkage: As in `lira`.
        membership: True where the member was trained on the example or on a copy of it; the bank's own if not given.

    Raises:
        DataError: The bank does not hold that value.
    """
    values = bank.values(f"example_{of}")
    values = -values if of == "loss" else values
    inside = bank.membership if membership is None else membership
    scores = lira_of_members(values, inside, subsets=bank.subsets, shrinkage=shrinkage)
    return BankEvidence(
        counterfactual(values, inside),
        simplicity(values, inside),
        scores,
        lira_global(values, inside, subsets=bank.subsets, shrinkage=shrinkage),
        int(np.isnan(scores).sum()),
    )
