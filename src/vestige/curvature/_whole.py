"""The Fisher matrix of an index over all its columns at once, between components too."""

from collections.abc import Iterator

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vestige.curvature._cache import fisher_of, require_memory
from vestige.curvature._fisher import FisherBlock, FisherBlocks, accumulate_fisher
from vestige.indexes import WHOLE_MODEL, Index
from vestige.storage import write_durably


def whole_fisher(index: Index) -> FisherBlocks:
    """Return one Fisher matrix of all columns of `index`; read from `curvature/` if it belongs to just these shards.

    Raises:
        UserError: The matrix and its factors, 28 bytes for each pair of columns, do not fit into memory.
    """
    if len(index.spans) == 1:
        return fisher_of(index)
    require_memory(index.width)
    columns = (slice(0, index.width),)
    path = index.folder / "curvature" / f"fisher-model-{index.fingerprint[:16]}.safetensors"
    try:
        with safe_open(path, "pt") as file:
            return FisherBlocks((FisherBlock(WHOLE_MODEL, file.get_tensor(WHOLE_MODEL)),), columns)
    except (FileNotFoundError, SafetensorError):
        found = accumulate_fisher([WHOLE_MODEL], columns, _counted(index))
    path.parent.mkdir(exist_ok=True)
    write_durably(path, [save({WHOLE_MODEL: found.blocks[0].matrix})])
    return found


def _counted(index: Index) -> Iterator[Tensor]:
    """Yield the gradients of the examples that count: those that were left out hold zeros."""
    skipped = torch.tensor(index.skipped)
    for block in index.blocks():
        yield block.gradients[~torch.isin(block.example, skipped)] if len(skipped) else block.gradients
