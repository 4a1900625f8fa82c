"""Losses of an example: over its targets, over its answer alone, as log-odds, and the gap to other tokens."""

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from vestige.banks import margin as log_odds
from vestige.measures._inputs import Batch, Column, Losses
from vestige.measures._registry import measure
from vestige.measures._tokens import TokenScores, mean_where


def loss(scores: TokenScores) -> Float[Tensor, "example"]:
    """Return the mean cross-entropy per target token, nats; low values speak for memorization.

    NaN without a target.

    Yeom et al. 2018, "Privacy risk in machine learning".
    """
    return -mean_where(scores.log_probability, scores.wanted)


def answer_loss(scores: TokenScores, answer: Bool[Tensor, "example token"]) -> Float[Tensor, "example"]:
    """Return mean cross-entropy over the whole vocabulary at the answer's tokens, nats; low speaks for memorization.

    Args:
        scores: Of all target tokens.
        answer: True at the positions that predict a token of the answer.

    Returns:
        NaN where no position is both a target and part of the answer.
    """
    return -mean_where(scores.log_probability, scores.wanted & answer)


def margin(mean_loss: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Return log(p / (1 - p)) with p = exp(-mean loss); high speaks for memorization.

    The logit scaling of Carlini et al. 2022, "Membership inference attacks from first principles", from the loss, so
    that nothing is lost where p is near 1 and the loss is known in float64. The same function fills a bank's margins.
    """
    return log_odds(np.asarray(mean_loss, dtype=np.float64))


@measure(
    "loss",
    "mean loss of the target tokens",
    sign=-1,
    order=10,
    curve=30,
    over_time=True,
    limits="low for any easy text, trained on or not: compare with a holdout or a bank",
)
def _loss(batch: Batch) -> Tensor:
    return loss(batch.scores)


@measure(
    "answer_loss",
    "mean loss of the answer alone, without its end token",
    needs=("token scores", "answer"),
    sign=-1,
    missing="a text without a prompt has no answer of its own",
    order=20,
    over_time=True,
    limits="low for any easy answer: compare with a holdout or a bank",
)
def _answer_loss(batch: Batch) -> Tensor:
    return answer_loss(batch.scores, batch.answer)


@measure(
    "margin",
    "log-odds of the mean probability of the target tokens",
    stage="losses",
    sign=1,
    cost="nothing: it is made of the loss",
    order=30,
    limits="ranks examples as the loss does; it is what banks compare",
)
def _margin(losses: Losses) -> Column:
    return margin(losses.mean)


@measure(
    "token_gap",
    "logit of the right token minus the largest other one, over the vocabulary, mean over target tokens",
    sign=1,
    order=40,
    limits="high for any easy text: compare with a holdout or a bank",
)
def _token_gap(batch: Batch) -> Tensor:
    return mean_where(batch.scores.gap, batch.scores.wanted)
