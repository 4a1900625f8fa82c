"""What a model predicts for each target token: the basis of the measures on text."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vestige.data import NO_TARGET
from vestige.errors import DataError


class TokenScores(NamedTuple):
    """Log-probabilities of target tokens, and how they compare with the other tokens at their position."""

    log_probability: Float[Tensor, "example token"]
    """Of the target, nats, float64; 0 where there is no target."""
    standardised: Float[Tensor, "example token"]
    """(log p - mean) / deviation of log p over the vocabulary, each token weighted by its probability."""
    gap: Float[Tensor, "example token"]
    """Logit of the target minus the largest other one; above 0 for a target that is the likeliest token."""
    wanted: Bool[Tensor, "example token"]
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
    logits, places = logits.double(), labels.clamp(min=0)[..., None]
    gap = (logits.gather(-1, places) - logits.scatter(-1, places, -torch.inf).amax(-1, keepdim=True))[..., 0]
    chances = torch.log_softmax(logits, dim=-1)
    target = chances.gather(-1, places)[..., 0]
    weights = chances.exp()
    # A token that is ruled out has log-probability minus infinity and weight 0: no part of the mean.
    finite = torch.where(weights > 0, chances, 0.0)
    mean = (weights * finite).sum(-1)
    spread = (weights * (finite - mean[..., None]).square()).sum(-1).sqrt()
    # Where all tokens are equally likely nothing sets the target apart.
    standard = torch.where(spread > 1e-12, (target - mean) / spread.clamp(min=1e-12), 0.0)
    nothing = torch.zeros_like(target)
    target, standard, gap = (torch.where(wanted, values, nothing) for values in (target, standard, gap))
    return TokenScores(target, standard, gap, wanted)


def mean_where(
    values: Float[Tensor, "example token"], wanted: Bool[Tensor, "example token"]
) -> Float[Tensor, "example"]:
    """Return the mean of each row's wanted values; NaN for a row that has none."""
    count = wanted.sum(-1)
    return torch.where(wanted, values, torch.zeros_like(values)).sum(-1) / torch.where(count > 0, count, torch.nan)
