"""Whether the right choice was made, and how sure the model was of it."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vestige.audit._logit_gap import logit_gap, offered_logits


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
