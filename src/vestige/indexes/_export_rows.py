"""An index in the order of its data, part by part: what layouts without a column for the example need."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vestige.indexes._shards import map_shard
from vestige.indexes._store import Index

_PART_BYTES = 16 * 2**20


class RowPart(NamedTuple):
    """Consecutive rows of the data."""

    start: int
    stop: int
    gradients: Float[Tensor, "row column"]


def parts_in_order(index: Index, rows: int | None = None) -> Iterator[RowPart]:
    """Yield every row of the data in order, `rows` at a time; not given: as many as fit into 16 MB."""
    step = rows or max(_PART_BYTES // (4 * index.width), 1)
    for start in range(0, index.rows, step):
        stop = min(start + step, index.rows)
        yield RowPart(start, stop, index.gradients_of(np.arange(start, stop)))


def exported_bytes(index: Index) -> int:
    """Return the size on disk of all rows in float32, with their loss, norm and number."""
    return index.rows * (4 * index.width + 16)


def losses_and_norms(index: Index) -> tuple[Float[Tensor, "row"], Float[Tensor, "row"]]:
    """Return loss and gradient norm of every example, in the order of the data."""
    loss, norm = torch.empty(index.rows), torch.empty(index.rows)
    for number in range(len(index.manifest.shard_rows)):
        stored = map_shard(index.folder, number)
        loss[stored.example], norm[stored.example] = stored.loss, stored.norm
    return loss, norm
