"""The tokens that an example's model finds hardest: Min-K% and Min-K%++."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vestige.errors import SpecError
from vestige.measures._inputs import Batch
from vestige.measures._registry import measure
from vestige.measures._tokens import TokenScores, mean_where


def min_k(scores: TokenScores, share: float = 0.2) -> Float[Tensor, "example"]:
    """Return the mean log-probability of the least likely tokens, nats; high speaks for memorization.

    NaN without a target.

    Shi et al. 2024, "Detecting pretraining data from large language models".

    Args:
        scores: Of all target tokens.
        share: Of each example's targets, at least one of them.

    Raises:
        SpecError: A share outside (0, 1].
    """
    return _mean_of_lowest(scores.log_probability, scores.wanted, share)


def min_k_plus_plus(scores: TokenScores, share: float = 0.2) -> Float[Tensor, "example"]:
    """Return the mean standardised log-probability of the lowest tokens; high speaks for memorization.

    NaN without a target.

    Each token's log-probability is compared with the mean and deviation of log-probabilities over the vocabulary at its
    position, under the model's own distribution; the lowest `share` are averaged. Zhang et al. 2024, "Min-K%++".

    Raises:
        SpecError: A share outside (0, 1].
    """
    return _mean_of_lowest(scores.standardised, scores.wanted, share)


def _mean_of_lowest(
    values: Float[Tensor, "example token"], wanted: Bool[Tensor, "example token"], share: float
) -> Float[Tensor, "example"]:
    if not 0 < share <= 1:
        raise SpecError(f"share={share}: give a share of the tokens above 0 and at most 1, such as 0.2.")
    ordered = values.masked_fill(~wanted, torch.inf).sort(dim=1).values
    keep = (wanted.sum(1) * share).floor().long().clamp(min=1)
    chosen = torch.arange(values.shape[1], device=values.device)[None] < keep[:, None]
    return mean_where(ordered, chosen & ordered.isfinite())


@measure(
    "min_k",
    "mean log-probability of the least likely fifth of the tokens",
    sign=1,
    order=50,
    limits="a weak hint: on texts of one kind often no better than the loss",
)
def _min_k(batch: Batch) -> Tensor:
    return min_k(batch.scores)


@measure(
    "min_k_plus_plus",
    "the same of standardised log-probabilities",
    sign=1,
    order=60,
    curve=70,
    limits="a weak hint: on texts of one kind often no better than the loss",
)
def _min_k_plus_plus(batch: Batch) -> Tensor:
    return min_k_plus_plus(batch.scores)
