"""Measures of multiple-choice answers: the gap of the right one, whether it was chosen, and how sure the model was."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vestige.errors import DataError
from vestige.measures._inputs import Batch
from vestige.measures._registry import measure


def logit_gap(
    logits: Float[Tensor, "example choice"],
    right: Int[Tensor, "example"],
    offered: Bool[Tensor, "example choice"] | None = None,
) -> Float[Tensor, "example"]:
    """Return the logit of the right choice minus the largest other one, float64; high speaks for memorization.

        g_i = z_{i,y} - max over k != y of z_{i,k}

    Args:
        logits: Of every choice, or of the whole vocabulary.
        right: Number of the choice that the training label names.
        offered: False for padding where examples have different numbers of choices.

    Returns:
        NaN where there is no other choice.

    Raises:
        DataError: The right choice is not offered.
    """
    values, offered = offered_logits(logits, right, offered)
    chosen = values.gather(1, right[:, None])[:, 0]
    others = values.scatter(1, right[:, None], -torch.inf).amax(1)
    alone = offered.sum(1) < 2
    return torch.where(alone, torch.nan, chosen - torch.where(alone, 0.0, others))


def accuracy(
    logits: Float[Tensor, "example choice"],
    right: Int[Tensor, "example"],
    offered: Bool[Tensor, "example choice"] | None = None,
) -> Float[Tensor, "example"]:
    """Return 1 where the right choice's logit is the largest, 0 where not, one half where it is tied with another.

    NaN where there is no other choice. Arguments as in `logit_gap`.
    """
    gap = logit_gap(logits, right, offered)
    return torch.where(gap.isnan(), gap, (gap > 0).double() + 0.5 * (gap == 0).double())


def brier(
    logits: Float[Tensor, "example choice"],
    right: Int[Tensor, "example"],
    offered: Bool[Tensor, "example choice"] | None = None,
) -> Float[Tensor, "example"]:
    """Return the squared distance of the choices' probabilities from the label's, 0 to 2; low speaks for memorization.

        sum over k of (p_k - [k = y])^2, p the softmax over the choices that are offered

    Brier 1950. Padding has probability 0 and adds nothing. Arguments as in `logit_gap`.
    """
    values, _ = offered_logits(logits, right, offered)
    chances = values.softmax(1)
    return (chances - torch.nn.functional.one_hot(right, logits.shape[1])).square().sum(1)


def offered_logits(
    logits: Float[Tensor, "example choice"],
    right: Int[Tensor, "example"],
    offered: Bool[Tensor, "example choice"] | None,
) -> tuple[Float[Tensor, "example choice"], Bool[Tensor, "example choice"]]:
    """Return logits in float64, minus infinity where nothing is offered, and what is offered.

    Raises:
        DataError: The right choice is not offered.
    """
    offered = torch.ones_like(logits, dtype=torch.bool) if offered is None else offered
    inside = (right >= 0) & (right < logits.shape[1])
    known = inside & offered.gather(1, right.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
    if not bool(known.all()):
        row = int((~known).nonzero()[0])
        raise DataError(f"Example {row} has choice {int(right[row])} for its label, which is not among those offered.")
    return logits.double().masked_fill(~offered, -torch.inf), offered


@measure(
    "logit_gap",
    "logit of the label minus the largest of the other choices",
    needs=("choices",),
    sign=1,
    order=90,
    curve=40,
    limits="of the first token in which the choices differ",
)
def _logit_gap(batch: Batch) -> Tensor:
    return batch.of_choices(logit_gap)


@measure(
    "accuracy",
    "whether the label is the choice with the largest logit",
    needs=("choices",),
    sign=1,
    order=100,
    limits="0, one half or 1: too coarse to rank examples",
)
def _accuracy(batch: Batch) -> Tensor:
    return batch.of_choices(accuracy)


@measure(
    "brier",
    "squared distance of the choices' probabilities from the label",
    needs=("choices",),
    sign=-1,
    order=110,
    limits="of the first token in which the choices differ",
)
def _brier(batch: Batch) -> Tensor:
    return batch.of_choices(brier)
