"""Hashes of earlier ids, for eight bytes of disk an example."""

from collections.abc import Sequence
from hashlib import blake2b
from typing import final

import numpy as np

from vestige import disk_arrays

_AT_ONCE = 2**17
"""Hashes."""


@final
class SeenIds:
    """Hashes of the ids so far, in sorted arrays of growing size: looking one up reads few of them."""

    def __init__(self) -> None:
        self._sorted: list[np.ndarray] = []

    def add(self, names: Sequence[str]) -> list[int]:
        """Add the next ids.

        Returns:
            Positions in `names` of those that came before, or share the hash of one that did: the caller must verify.
        """
        joined = b"".join(blake2b(name.encode(), digest_size=8).digest() for name in names)
        codes = np.frombuffer(joined, dtype=np.uint64)
        new, firsts, which = np.unique(codes, return_index=True, return_inverse=True)
        again = np.ones(len(codes), dtype=bool)
        again[firsts] = False
        for known in self._sorted:
            again |= _among(new, known)[which]
        self._keep(new)
        return np.flatnonzero(again).tolist()

    def _keep(self, codes: np.ndarray) -> None:
        # Like carrying when counting: arrays of like size become one, so there are few, and each code moves seldom.
        while self._sorted and len(self._sorted[-1]) <= len(codes):
            codes = _merged(self._sorted.pop(), codes)
        if len(codes):
            self._sorted.append(codes)


def _among(codes: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Return which of the codes are known; both are sorted, so some codes at a time are searched for in one region."""
    found = []
    for some in np.array_split(codes, 1 + len(known) // _AT_ONCE):
        places = np.minimum(np.searchsorted(known, some), len(known) - 1)
        found.append(known[places] == some)
        disk_arrays.let_go(known)
    return np.concatenate(found)


def _merged(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Merge both sorted arrays. They are of hashes, so as much of each lies in any range."""
    merged = disk_arrays.zeros(len(one) + len(other), np.uint64)
    taken = filled = 0
    for part in disk_arrays.parts(one):
        stop = int(np.searchsorted(other, part[-1]))
        both = np.sort(np.concatenate([part, other[taken:stop]]), kind="stable")
        merged[filled : filled + len(both)] = both
        taken, filled = stop, filled + len(both)
        disk_arrays.let_go(other, merged)
    merged[filled:] = other[taken:]
    return merged
