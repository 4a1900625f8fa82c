"""Fisher blocks of an index, computed once and kept beside it."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from vestige.curvature._fisher import FisherBlock, FisherBlocks, accumulate_fisher
from vestige.files import write_durably
from vestige.index import Index
from vestige.progress import progress


def fisher_of(index: Index) -> FisherBlocks:
    """The Fisher blocks of all rows of `index`; read from `curvature/` when they belong to just these shards."""
    names = [component.name for component in index.manifest.components]
    columns = [index.columns(number) for number in range(len(names))]
    path = index.folder / "curvature" / f"fisher-{index.fingerprint[:16]}.safetensors"
    found = _read(path, names, columns)
    if found is None:
        with progress(index.rows, "Curvature") as bar:
            found = accumulate_fisher(names, columns, _counted(index, bar))
        _write(path, found)
    return found


def _counted(index: Index, bar: Any) -> Any:
    for block in index.blocks():
        yield block.gradients
        bar.advance(len(block.example))


def _write(path: Path, fisher: FisherBlocks) -> None:
    tensors = {block.name: block.matrix for block in fisher.blocks}
    path.parent.mkdir(exist_ok=True)
    write_durably(path, [save(tensors)])


def _read(path: Path, names: list[str], columns: list[slice]) -> FisherBlocks | None:
    """The stored blocks, None if there are none or the file is damaged: they are cheap to compute again."""
    try:
        with safe_open(path, "pt") as file:
            blocks = [FisherBlock(name, file.get_tensor(name)) for name in names]
    except (FileNotFoundError, SafetensorError):
        return None
    return FisherBlocks(tuple(blocks), tuple(columns))
