"""Losses of a text over what it takes anyway: after zlib, or under another model."""

import zlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from vestige.errors import DataError
from vestige.measures._inputs import Column, Losses
from vestige.measures._registry import measure

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
