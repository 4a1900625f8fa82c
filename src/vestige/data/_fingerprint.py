"""The fingerprint of a data set: its ids, its tokens and its targets, and nothing else."""

import hashlib
from collections.abc import Sequence

import numpy as np

from vestige.data._types import Example


def data_fingerprint(
    examples: Sequence[Example], input_ids: Sequence[np.ndarray], targets: Sequence[np.ndarray]
) -> str:
    """Return the sha256 of ids, tokens and targets, in order, in hexadecimal.

    The same on every platform: token ids are hashed as little-endian int32 and every part is preceded by its
    length, so that no two data sets run together into the same bytes.
    """
    digest = hashlib.sha256()
    for example, ids, mask in zip(examples, input_ids, targets, strict=True):
        digest.update(hashed(example.id, ids, mask))
    return digest.hexdigest()


def hashed(name: str, ids: np.ndarray, targets: np.ndarray) -> bytes:
    """Return what one example adds to the fingerprint: its id, its tokens and its targets."""
    encoded = name.encode()
    about = f"{len(encoded)} {len(ids)} ".encode()
    tokens = np.ascontiguousarray(ids, dtype="<i4").tobytes()
    return about + encoded + tokens + np.packbits(targets.astype(bool)).tobytes()
