"""How far the right choice's logit is above every other's."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vestige.errors import DataError


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
