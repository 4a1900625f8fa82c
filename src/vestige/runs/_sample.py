"""Rows that stand for all: those with the smallest hash of their number, the same in every run."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int, UInt64

from vestige.row_order import windows


def sampled_rows(examples: int, wanted: int) -> Int[np.ndarray, "kept"]:
    """Return `wanted` row numbers, ascending: those with the smallest hash, the same in every run."""
    largest = hash_of(examples, min(wanted, examples))
    return np.concatenate([np.arange(0), *(rows[hashed(rows) <= largest] for rows in _numbers(examples))])


def hash_of(examples: int, wanted: int) -> int:
    """Return the hash that `wanted` of the examples do not exceed."""
    if wanted == examples:
        return 2**64 - 1
    first_bits = np.uint64(48)
    counts = sum(np.bincount(hashed(rows) >> first_bits, minlength=2**16) for rows in _numbers(examples))
    reached = np.cumsum(counts)
    first = int(np.searchsorted(reached, wanted))
    hashes = (hashed(rows) for rows in _numbers(examples))
    alike = np.concatenate([each[each >> first_bits == first] for each in hashes])
    return int(np.sort(alike)[wanted - 1 - int(reached[first]) + len(alike)])


def _numbers(examples: int) -> Iterator[Int[np.ndarray, "part"]]:
    """Yield all row numbers, part by part."""
    return (np.arange(rows.start, rows.stop) for rows in windows(examples))


def hashed(rows: Int[np.ndarray, "row"]) -> UInt64[np.ndarray, "row"]:
    """Hash by splitmix64's finaliser, which is one to one: neighbouring row numbers land far apart."""
    code = (rows.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    code = (code ^ (code >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    code = (code ^ (code >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return code ^ (code >> np.uint64(31))
