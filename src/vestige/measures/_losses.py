"""Measures of token losses: loss, margin, gap, Min-K%, ratios to zlib and another model, and their fall in training."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from vestige.errors import DataError, SpecError
from vestige.lazy import torch
from vestige.measures._measure import (
    Batch,
    Column,
    Losses,
    PerExample,
    PerToken,
    TokenMask,
    TokenScores,
    measure,
)

if TYPE_CHECKING:
    from torch import Tensor

_LEAST_DOUBT = 2.0**-52
"""A margin is the log-odds of a probability; one that float32 rounds to 1 counts as this far from it."""


def loss(scores: TokenScores) -> PerExample:
    """Return the mean cross-entropy per target token, nats; low speaks for memorization, NaN without a target.

    Yeom et al. 2018, "Privacy risk in machine learning".
    """
    return -_mean_where(scores.log_probability, scores.wanted)


def answer_loss(scores: TokenScores, answer: TokenMask) -> PerExample:
    """Return the mean cross-entropy over the vocabulary at the answer's tokens, nats; low speaks for memorization.

    `answer` is True at the positions that predict a token of the answer; NaN where none of them is a target.
    """
    return -_mean_where(scores.log_probability, scores.wanted & answer)


def margin(mean_loss: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Return log(p / (1 - p)) with p = exp(-mean loss); high speaks for memorization.

    The logit scaling of Carlini et al. 2022, "Membership inference attacks from first principles", from the loss, so
    that nothing is lost where p is near 1 and the loss is known in float64. The same function fills a bank's margins.
    """
    losses = np.asarray(mean_loss, dtype=np.float64)
    return -losses - np.log(np.maximum(-np.expm1(-losses), _LEAST_DOUBT))


def min_k(scores: TokenScores, share: float = 0.2) -> PerExample:
    """Return the mean log-probability of the least likely tokens, nats; high speaks for memorization.

    NaN without a target. Shi et al. 2024, "Detecting pretraining data from large language models".

    Args:
        scores: Of all target tokens.
        share: Of each example's targets, at least one of them.

    Raises:
        SpecError: A share outside (0, 1].
    """
    return _mean_of_lowest(scores.log_probability, scores.wanted, share)


def min_k_plus_plus(scores: TokenScores, share: float = 0.2) -> PerExample:
    """Return the mean standardised log-probability of the lowest tokens; high speaks for memorization.

    Each token's log-probability is compared with the mean and deviation of log-probabilities over the vocabulary at its
    position, under the model's own distribution. Zhang et al. 2024, "Min-K%++". Arguments and errors as in `min_k`.
    """
    return _mean_of_lowest(scores.standardised, scores.wanted, share)


def zlib_ratio(total_loss: Column, texts: Sequence[str]) -> Column:
    """Return the bits that the model needs for a text over those that zlib needs; low speaks for memorization.

        (sum of token losses / log 2) / (8 * bytes after zlib)

    Carlini et al. 2021, "Extracting training data from large language models". Losses are summed over tokens, nats.

    Raises:
        DataError: Losses and texts differ in number.
    """
    total_loss = np.asarray(total_loss, dtype=np.float64)
    if total_loss.shape != (len(texts),):
        raise DataError(f"{total_loss.shape} losses for {len(texts)} texts.")
    # The header alone takes 8 bytes, so an empty text divides by no zero.
    size = np.array([8 * len(zlib.compress(text.encode("utf-8"))) for text in texts], dtype=np.float64)
    return total_loss / np.log(2) / size


def perplexity_ratio(mean_loss: Column, reference_loss: Column) -> Column:
    """Return log perplexity over the reference model's perplexity, nats per token; low speaks for memorization.

        log(exp(loss) / exp(reference loss)) = loss - reference loss

    The logarithm ranks as the ratio does and cannot overflow. Carlini et al. 2021, "Extracting training data from large
    language models". Both losses are per token of the same text; models with different tokenizers need losses per
    byte instead.

    Raises:
        DataError: The two do not have the same number of examples.
    """
    mean_loss, reference_loss = np.asarray(mean_loss, np.float64), np.asarray(reference_loss, np.float64)
    if mean_loss.shape != reference_loss.shape:
        raise DataError(f"{mean_loss.shape} losses, but {reference_loss.shape} of the reference model.")
    return mean_loss - reference_loss


def loss_trajectory(losses: Float[np.ndarray, "checkpoint example"]) -> Column:
    """Return how far each example's loss lay below its first one, mean over the later checkpoints, nats per token.

        mean over t > 0 of (loss_0 - loss_t)

    High speaks for membership: what is trained on falls sooner and further. The trajectory is that of the training
    itself, so no shadow model is needed to interpret it; Liu et al. 2022, "Membership inference attacks by exploiting
    loss trajectory", distil one and let a classifier read it. The first checkpoint is the comparison that makes easy
    texts no better than hard ones; take one from before the examples were seen.

    Args:
        losses: Mean loss per target token, in the order of training.

    Returns:
        NaN where a loss is not finite.

    Raises:
        DataError: Fewer than two checkpoints.
    """
    losses = np.asarray(losses, dtype=np.float64)
    if losses.ndim != 2 or len(losses) < 2:
        raise DataError(f"Losses {losses.shape}: give those of two or more checkpoints, [checkpoint, example].")
    losses = np.where(np.isfinite(losses), losses, np.nan)
    return (losses[0] - losses[1:]).mean(0)


def _mean_where(values: PerToken, wanted: TokenMask) -> PerExample:
    """Return the mean of each row's wanted values; NaN for a row that has none."""
    count = wanted.sum(-1)
    return torch.where(wanted, values, 0.0).sum(-1) / torch.where(count > 0, count, torch.nan)


def _mean_of_lowest(values: PerToken, wanted: TokenMask, share: float) -> PerExample:
    if not 0 < share <= 1:
        raise SpecError(f"share={share}: give a share of the tokens above 0 and at most 1, such as 0.2.")
    ordered = values.masked_fill(~wanted, torch.inf).sort(dim=1).values
    keep = (wanted.sum(1) * share).floor().long().clamp(min=1)
    chosen = torch.arange(values.shape[1], device=values.device)[None] < keep[:, None]
    return _mean_where(ordered, chosen & ordered.isfinite())


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
    return _mean_where(batch.scores.gap, batch.scores.wanted)


_WEAK_HINT = "a weak hint: on texts of one kind often no better than the loss"


@measure("min_k", "mean log-probability of the least likely fifth of the tokens", sign=1, order=50, limits=_WEAK_HINT)
def _min_k(batch: Batch) -> Tensor:
    return min_k(batch.scores)


@measure("min_k_plus_plus", "the same of standardised log-probabilities", sign=1, order=60, curve=70, limits=_WEAK_HINT)
def _min_k_plus_plus(batch: Batch) -> Tensor:
    return min_k_plus_plus(batch.scores)


@measure(
    "zlib_ratio",
    "bits the model needs over bits zlib needs",
    stage="losses",
    needs=("token scores", "tokenizer"),
    sign=-1,
    missing="no target token, or a model without tokenizer",
    cost="zlib over every text",
    order=70,
    limits="corrects for repetition alone, not for what any model knows",
)
def _zlib_ratio(losses: Losses) -> Column:
    if losses.texts is None:
        return np.full(len(losses.total), np.nan)
    return np.where(losses.data.target_counts > 0, zlib_ratio(losses.total, losses.texts), np.nan)


@measure(
    "perplexity_ratio",
    "log of perplexity over the reference model's",
    stage="losses",
    needs=("token scores", "reference model"),
    sign=-1,
    missing="cut off for one of the two models",
    cost="a forward pass of the reference model",
    order=80,
    limits="as good as the reference: it should know the kind of text and none of the examples",
)
def _perplexity_ratio(losses: Losses) -> Column:
    assert losses.reference_total is not None
    # Per token of this model, so that a reference with other tokens is compared on the same text.
    return perplexity_ratio(losses.total / losses.targets, losses.reference_total / losses.targets)


@measure(
    "loss_trajectory",
    "fall of the loss since the first checkpoint, mean over the later ones",
    stage="checkpoints",
    needs=("token scores", "checkpoints"),
    sign=1,
    missing="no target token, or one checkpoint alone",
    cost="nothing beside the forward passes over every checkpoint",
    limits="needs a first checkpoint from before the examples were seen; texts like the training data fall too",
    order=35,
    curve=35,
    detail="from the first checkpoint to the model under audit {}",
)
def _loss_trajectory(losses: Float[np.ndarray, "checkpoint example"]) -> dict[str, Column]:
    if len(losses) < 2:
        return {"loss_trajectory": np.full(losses.shape[1], np.nan)}
    return {"loss_trajectory": loss_trajectory(losses), "loss_trajectory_fall": losses[0] - losses[-1]}
