"""What being trained on an example changes about it over many models, and how easy it is for them anyway."""

import numpy as np
from jaxtyping import Bool, Float

from vestige.errors import DataError
from vestige.measures._inputs import BankValues, Column
from vestige.measures._registry import measure

FEW_MODELS = "fewer than two models of the bank with or without the example and its copies, or it is not in the bank"


def counterfactual(
    values: Float[np.ndarray, "member example"], membership: Bool[np.ndarray, "member example"]
) -> Float[np.ndarray, "example"]:
    """Return the mean value of the models trained on an example minus that of the others; high is memorized.

    Zhang et al. 2023, "Counterfactual memorization in neural language models"; Feldman and Zhang 2020.

    Args:
        values: That rise as a model learns an example better: margins, gaps, or minus the losses.
        membership: True where the member was trained on the example.

    Returns:
        NaN where one of the two sides has no model.
    """
    inside, outside = side_means(values, membership)
    return inside - outside


def simplicity(
    values: Float[np.ndarray, "member example"], membership: Bool[np.ndarray, "member example"]
) -> Float[np.ndarray, "example"]:
    """Return the mean value of the models trained on an example plus that of the others; high is easy.

    Arguments as in `counterfactual`, of which it is the other half: the same two means, added up. NaN where one of the
    two sides has no model.
    """
    inside, outside = side_means(values, membership)
    return inside + outside


def side_means(
    values: Float[np.ndarray, "member example"], membership: Bool[np.ndarray, "member example"]
) -> tuple[Float[np.ndarray, "example"], Float[np.ndarray, "example"]]:
    """Return mean values of the models with and without each example; NaN for a side that has none.

    Values that are not finite are left out.

    Raises:
        DataError: The arrays differ in shape.
    """
    values = checked(values, membership)
    return _mean(values, membership), _mean(values, ~membership)


def checked(
    values: Float[np.ndarray, "member example"], membership: Bool[np.ndarray, "member example"]
) -> Float[np.ndarray, "member example"]:
    """Return the values in float64.

    Raises:
        DataError: Not one value for each member and example.
    """
    if values.ndim != 2 or values.shape != membership.shape or membership.dtype != np.bool_:
        raise DataError(
            f"Values {values.shape} and membership {membership.shape} of {membership.dtype}: both must be [member, "
            "example], membership of bool. `Bank.open(folder)` has `example_margins` and `membership`."
        )
    return np.asarray(values, dtype=np.float64)


def _mean(values: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    chosen = chosen & np.isfinite(values)
    count = chosen.sum(0)
    return np.where(chosen, values, 0.0).sum(0) / np.where(count > 0, count, np.nan)


@measure(
    "counterfactual",
    "mean over models trained on the example minus mean over those that were not",
    stage="bank",
    needs=("bank",),
    sign=1,
    early_sign=1,
    missing=FEW_MODELS,
    cost="a bank of trained models; then nothing",
    limits="about models like these, not about the one under audit",
    order=170,
    curve=50,
)
def _counterfactual(bank: BankValues) -> Column:
    return counterfactual(bank.values, bank.membership)


@measure(
    "simplicity",
    "sum of the same two means",
    stage="bank",
    needs=("bank",),
    high="easy anyway",
    missing=FEW_MODELS,
    cost="a bank of trained models; then nothing",
    limits="says how easy an example is, not whether it is memorized",
    order=180,
)
def _simplicity(bank: BankValues) -> Column:
    return simplicity(bank.values, bank.membership)
