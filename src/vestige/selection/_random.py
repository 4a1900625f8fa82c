"""Numbers that follow from an example's id and a seed alone: the order of the data decides nothing."""

import hashlib
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float

Purpose = Literal["ties", "random", "gumbel"]


def uniforms(ids: Sequence[str], seed: int, purpose: Purpose) -> Float[np.ndarray, "example"]:
    """Return a number between 0 and 1 for each id, both ends excluded; no two purposes share them."""
    key = f"{purpose} {seed}".encode()
    words = (hashlib.blake2b(name.encode(), digest_size=8, key=key).digest() for name in ids)
    numbers = np.frombuffer(b"".join(words), dtype="<u8")
    # 52 bits and a half step: a float64 holds each exactly, and none is 0 or 1.
    return ((numbers >> np.uint64(12)).astype(np.float64) + 0.5) / 2.0**52
