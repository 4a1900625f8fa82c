"""Which candidates repeat a chosen example: cosines of gradients, a few candidates at a time."""

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from vestige.indexes import Index
from vestige.selection._diverse import unit_rows
from vestige.selection._orders import Candidate, CutShort, Order

_LOOK_AHEAD = 32
_FIRST_ROOM = 256


class Judged(NamedTuple):
    """A candidate, and the chosen example that it repeats."""

    candidate: Candidate | CutShort
    twin: int | None = None
    """Number of the chosen example among those without a twin, None where it repeats none."""
    cosine: float = 0.0


def without_twins(order: Order, index: Index, threshold: float) -> Iterator[Judged]:
    """Yield candidates in their order, each with its twin.

    A candidate has a twin if its cosine with an earlier one without a twin reaches `threshold`.

    Of several such, the most similar one is named, and the earliest of equals. A gradient of zero is like none.
    """
    kept = torch.empty((_FIRST_ROOM, index.width))
    count = 0
    while chunk := list(islice(order, _LOOK_AHEAD)):
        rows = [each.row for each in chunk if isinstance(each, Candidate)]
        unit = iter(unit_rows(index.gradients_of(rows)))
        for candidate in chunk:
            if isinstance(candidate, CutShort):
                yield Judged(candidate)
                continue
            vector = next(unit)
            cosines = kept[:count] @ vector
            most = int(cosines.argmax()) if count else 0
            if count and float(cosines[most]) >= threshold - _rounding(vector):
                yield Judged(candidate, most, min(float(cosines[most]), 1.0))
                continue
            if count == len(kept):
                kept = torch.cat([kept, torch.empty_like(kept)])
            kept[count] = vector
            count += 1
            yield Judged(candidate)


def _rounding(vector: Tensor) -> float:
    """Return about how much a copy's cosine with itself misses 1 by."""
    return 4 * torch.finfo(vector.dtype).eps
