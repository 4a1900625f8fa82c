"""The Fisher matrix of an index over all its columns at once, between components too."""

import psutil
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from vestige.curvature._fisher import FisherBlock, FisherBlocks, accumulate_fisher
from vestige.errors import UserError
from vestige.files import write_durably
from vestige.index import Index
from vestige.progress import format_bytes

NAME = "all components"


def whole_fisher(index: Index) -> FisherBlocks:
    """One Fisher matrix of all columns of `index`; read from `curvature/` when it belongs to just these shards.

    Raises:
        UserError: The matrix and its factors, 28 bytes for each pair of columns, do not fit into memory.
    """
    needed, available = 28 * index.width**2, psutil.virtual_memory().available
    if needed > available:
        raise UserError(
            f"One Fisher matrix over {index.width:,} columns needs {format_bytes(needed)} of memory, and "
            f"{format_bytes(available)} are free. Drop --option fisher=model, or make a narrower index."
        )
    columns = (slice(0, index.width),)
    path = index.folder / "curvature" / f"fisher-model-{index.fingerprint[:16]}.safetensors"
    try:
        with safe_open(path, "pt") as file:
            return FisherBlocks((FisherBlock(NAME, file.get_tensor(NAME)),), columns)
    except (FileNotFoundError, SafetensorError):
        found = accumulate_fisher([NAME], columns, (block.gradients for block in index.blocks()))
    path.parent.mkdir(exist_ok=True)
    write_durably(path, [save({NAME: found.blocks[0].matrix})])
    return found
