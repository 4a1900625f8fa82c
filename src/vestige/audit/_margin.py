"""Log-odds of an example's tokens: the form in which confidences are close to Gaussian."""

import numpy as np
from jaxtyping import Float

from vestige.bank import margin as log_odds


def margin(mean_loss: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Return log(p / (1 - p)) with p = exp(-mean loss); high speaks for memorization.

    The logit scaling of Carlini et al. 2022, "Membership inference attacks from first principles", from the loss, so
    that nothing is lost where p is near 1 and the loss is known in float64. The same function fills a bank's margins.
    """
    return log_odds(np.asarray(mean_loss, dtype=np.float64))
