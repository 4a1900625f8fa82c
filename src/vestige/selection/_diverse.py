"""Facility location: the few gradients that represent all gradients best, by lazy greedy search."""

import heapq
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

_DIGITS = 5
"""Gains are rounded to this many digits, in units of an example: what is equal but for rounding is a tie."""
_BLOCK_NUMBERS = 2**24
"""Most similarities alive at once."""


def unit_rows(vectors: Float[Tensor, "row column"]) -> Float[Tensor, "row column"]:
    """Divide rows by their lengths; one of length zero stays zero, and is like none."""
    lengths = vectors.norm(dim=1, keepdim=True)
    return torch.where(lengths > 0, vectors / lengths.clamp_min(torch.finfo(vectors.dtype).tiny), 0.0)


def facility_location(vectors: Float[Tensor, "row column"], ties: Float[Tensor, "row"]) -> Iterator[tuple[int, float]]:
    """Yield rows in greedy order, each with what it adds to `F(S) = mean_i max(0, max_{j in S} cos(i, j))`.

    F is monotone and submodular, so the greedy set reaches at least `1 - 1/e` of the best possible (Nemhauser et al.
    1978). A row's gain only falls as others are taken, so that an old gain is an upper bound, and only rows at the top
    of the heap are computed again (Minoux 1978): the order is the plain greedy one, ties in ascending order of `ties`.
    The start costs all pairs of rows, each later evaluation one product with `vectors`.
    """
    unit = unit_rows(vectors)
    count = len(unit)
    covered = torch.zeros(count, dtype=unit.dtype)
    order = [float(tie) for tie in ties]
    heap = [(-round(gain, _DIGITS), order[row], row) for row, gain in enumerate(_first_gains(unit).tolist())]
    heapq.heapify(heap)
    while heap:
        _, _, row = heapq.heappop(heap)
        similar = (unit @ unit[row]).clamp_min(0)
        gain = round(float((similar - covered).clamp_min(0).sum(dtype=torch.float64)), _DIGITS)
        entry = (-gain, order[row], row)
        if heap and entry > heap[0]:
            heapq.heappush(heap, entry)
            continue
        covered = torch.maximum(covered, similar)
        yield row, gain / count


def _first_gains(unit: Float[Tensor, "row column"]) -> Float[Tensor, "row"]:
    """Return what each row alone represents, summed over all rows."""
    step = max(1, _BLOCK_NUMBERS // max(len(unit), 1))
    blocks = (unit[start : start + step] @ unit.T for start in range(0, len(unit), step))
    return torch.cat([block.clamp_min(0).sum(1, dtype=torch.float64) for block in blocks])
