"""How much more a model has learned of an example than another model."""

import numpy as np
from jaxtyping import Float

from vestige.errors import DataError


def perplexity_ratio(
    mean_loss: Float[np.ndarray, "example"], reference_loss: Float[np.ndarray, "example"]
) -> Float[np.ndarray, "example"]:
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
