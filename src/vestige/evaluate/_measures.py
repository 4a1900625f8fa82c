"""How far inner products are from the ones they stand for. Tensors to numbers; uses no model and no file."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import rankdata
from torch import Tensor


class Quality(NamedTuple):
    """Agreement of estimated inner products with the right ones."""

    rmse: float
    """Mean over references i of RMSE_i = sqrt(mean over tests j of (D_ij - E_ij)^2), in nats squared."""
    rmse_std: float
    """Spread of RMSE_i over the references: standard deviation, population form."""
    relative: float
    """`rmse` over the root mean square of the right inner products."""
    nrmse: float
    """Root mean square of (D_ij - E_ij) / (|g_i| |g_j|): the error of a cosine."""
    spearman: float
    """Mean over references of the rank correlation over tests."""
    pearson: float
    """Mean over references of the correlation over tests."""


def quality(
    estimate: Float[Tensor, "reference test"],
    exact: Float[Tensor, "reference test"],
    lengths: Float[Tensor, "reference test"],
) -> Quality:
    """Return the error measures of inner products `estimate`, of which `exact` are right.

    Args:
        estimate: D, inner products of compressed gradients.
        exact: E, what they should be.
        lengths: Product of the two gradients' norms. Pairs in which it is zero have no cosine and are left out of it.

    Returns:
        NaN for a correlation where no reference's products vary.
    """
    estimate, exact, lengths = (values.double().cpu() for values in (estimate, exact, lengths))
    errors = estimate - exact
    rmse = errors.square().mean(1).sqrt()
    size = exact.square().mean().sqrt()
    known = lengths > 0
    cosine = (errors[known] / lengths[known]).square().mean().sqrt()
    return Quality(
        float(rmse.mean()),
        float(rmse.std(correction=0)),
        float(rmse.mean() / size),
        float(cosine),
        _correlation(_ranks(estimate), _ranks(exact)),
        _correlation(estimate, exact),
    )


def _ranks(values: Tensor) -> Tensor:
    return torch.from_numpy(np.asarray(rankdata(values.numpy(), axis=1), dtype=np.float64))


def _correlation(first: Tensor, second: Tensor) -> float:
    """Return the mean over rows of the correlation of two rows, those left out in which one does not vary."""
    first, second = first - first.mean(1, keepdim=True), second - second.mean(1, keepdim=True)
    spread = first.norm(dim=1) * second.norm(dim=1)
    varies = spread > 0
    if not bool(varies.any()):
        return float("nan")
    return float(((first * second).sum(1)[varies] / spread[varies]).mean())
