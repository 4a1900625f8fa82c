"""Loss of each example over all its target tokens."""

from jaxtyping import Float
from torch import Tensor

from vestige.audit._tokens import TokenScores, mean_where


def loss(scores: TokenScores) -> Float[Tensor, "example"]:
    """Return the mean cross-entropy per target token, nats; low values speak for memorization.

    NaN without a target.

    Yeom et al. 2018, "Privacy risk in machine learning".
    """
    return -mean_where(scores.log_probability, scores.wanted)
