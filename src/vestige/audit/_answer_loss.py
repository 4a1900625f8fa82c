"""Loss of each example on the tokens of its answer alone."""

from jaxtyping import Bool, Float
from torch import Tensor

from vestige.audit._tokens import TokenScores, mean_where


def answer_loss(scores: TokenScores, answer: Bool[Tensor, "example token"]) -> Float[Tensor, "example"]:
    """Return mean cross-entropy over the whole vocabulary at the answer's tokens, nats; low speaks for memorization.

    Args:
        scores: Of all target tokens.
        answer: True at the positions that predict a token of the answer.

    Returns:
        NaN where no position is both a target and part of the answer.
    """
    return -mean_where(scores.log_probability, scores.wanted & answer)
