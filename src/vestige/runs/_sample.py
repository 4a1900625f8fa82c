"""Rows that stand for all: those with the smallest hash of their number, the same in every run."""

import numpy as np
from jaxtyping import Int, UInt64


def sampled_rows(examples: int, wanted: int) -> Int[np.ndarray, "kept"]:
    """Return `wanted` row numbers, ascending: those with the smallest hash, the same in every run."""
    return np.flatnonzero(hashed(np.arange(examples)) <= hash_of(examples, min(wanted, examples)))


def hash_of(examples: int, wanted: int) -> int:
    """Return the hash that `wanted` of the examples do not exceed."""
    if wanted == examples:
        return 2**64 - 1
    return int(np.partition(hashed(np.arange(examples)), wanted - 1)[wanted - 1])


def hashed(rows: Int[np.ndarray, "row"]) -> UInt64[np.ndarray, "row"]:
    """Hash by splitmix64's finaliser, which is one to one: neighbouring row numbers land far apart."""
    code = (rows.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    code = (code ^ (code >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    code = (code ^ (code >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return code ^ (code >> np.uint64(31))
