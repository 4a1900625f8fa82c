"""Gradients that were computed elsewhere, written as an index."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vestige.data import TokenizedData
from vestige.indexes._content import ShardContent, parts_of
from vestige.indexes._examples import fingerprint_rows
from vestige.indexes._manifest import Manifest
from vestige.indexes._plan import plan_index
from vestige.indexes._run import prepare_index, remove_index
from vestige.indexes._store import Index
from vestige.indexes._work import IndexPlan, PlannedBatches
from vestige.launch import run_plan
from vestige.settings import LaunchSettings

ReadRows = Callable[[Int[np.ndarray, "row"]], Float[Tensor, "row column"]]
"""From positions in the data to their gradients, float32, columns in the order of the manifest's components."""


def write_rows(out: Path, draft: Manifest, data: TokenizedData, read: ReadRows, *, overwrite: bool = False) -> Index:
    """Write gradients that were computed elsewhere as an index, and return it opened; its losses are 0.

    Shards that are there already are kept, so that a call that was interrupted is repeated.

    Args:
        out: Folder of the index.
        draft: Its manifest without stages; `imported` says where the gradients come from. Compression `IMPORTED_SPEC`
            stands for a projection that is not known: gradients of new queries are then refused.
        data: The examples, one for each row, with or without tokens.
        read: Reads rows; called once for each part of a shard.
        overwrite: Replace an index in `out`.

    Raises:
        IndexMismatch: `out` holds an index of other settings or examples.
        NonFinite: A row has a number that is not finite; the message names its example.
        UserError: `out` holds other files, or cannot be written to.
    """
    if overwrite:
        remove_index(out)
    # Rows of equal length are planned in the order in which they are given.
    lengths = np.ones(len(data), dtype=np.int64)
    manifest, plan = plan_index(out, draft, lengths, lambda start, stop: fingerprint_rows(data, start, stop))

    def content(batches: PlannedBatches) -> Iterator[ShardContent]:
        for part in parts_of(batches, manifest.width):
            rows = np.concatenate(list(part.batches))
            gradients = read(rows)
            yield ShardContent(gradients, torch.zeros(len(rows)), gradients.norm(dim=1), torch.from_numpy(rows))

    work = IndexPlan(out, manifest, plan, data.examples, lambda: nullcontext(content))
    prepare_index(work)
    return run_plan(work, LaunchSettings(), None)
