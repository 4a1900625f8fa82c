"""Whether an id came before, for eight bytes an example."""

from collections.abc import Sequence
from hashlib import blake2b
from typing import final

import numpy as np


@final
class SeenIds:
    """Hashes of the ids so far, in sorted arrays of growing size: looking one up reads few of them."""

    def __init__(self) -> None:
        self._sorted: list[np.ndarray] = []

    def add(self, names: Sequence[str]) -> list[int]:
        """Take in the next ids.

        Returns:
            Positions in `names` of those that were seen before, or have the hash of one that was: whoever asks looks.
        """
        joined = b"".join(blake2b(name.encode(), digest_size=8).digest() for name in names)
        codes = np.frombuffer(joined, dtype=np.uint64)
        found = np.zeros(len(codes), dtype=bool)
        for known in self._sorted:
            places = np.minimum(np.searchsorted(known, codes), len(known) - 1)
            found |= known[places] == codes
        firsts = np.unique(codes, return_index=True)
        again = np.ones(len(codes), dtype=bool)
        again[firsts[1]] = False
        self._keep(firsts[0])
        return np.flatnonzero(found | again).tolist()

    def _keep(self, codes: np.ndarray) -> None:
        # Like carrying when counting: arrays of like size become one, so there are few, and each code moves seldom.
        while self._sorted and len(self._sorted[-1]) <= len(codes):
            codes = np.sort(np.concatenate([self._sorted.pop(), codes]), kind="stable")
        if len(codes):
            self._sorted.append(codes)
