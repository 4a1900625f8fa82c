"""How much a model has learned of an example beyond its plain repetitiveness."""

import zlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from vestige.errors import DataError

_BITS = 8


def zlib_ratio(total_loss: Float[np.ndarray, "example"], texts: Sequence[str]) -> Float[np.ndarray, "example"]:
    """Return the bits that the model needs for a text over those that zlib needs; low speaks for memorization.

        (sum of token losses / log 2) / (8 * bytes after zlib)

    Carlini et al. 2021, "Extracting training data from large language models".

    Args:
        total_loss: Summed over tokens, nats.
        texts: What was predicted, one per loss.

    Raises:
        DataError: Losses and texts differ in number.
    """
    total_loss = np.asarray(total_loss, dtype=np.float64)
    if total_loss.shape != (len(texts),):
        raise DataError(f"{total_loss.shape} losses for {len(texts)} texts.")
    # The header alone takes 8 bytes, so an empty text divides by no zero.
    size = np.array([_BITS * len(zlib.compress(text.encode("utf-8"))) for text in texts], dtype=np.float64)
    return total_loss / np.log(2) / size
