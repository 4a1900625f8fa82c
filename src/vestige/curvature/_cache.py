"""Fisher blocks of an index, computed once, group of shards by group of shards, and kept beside it.

A block for each component, or a single one where the gradients of all components were added up.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import psutil
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vestige.curvature._fisher import FisherBlock, FisherBlocks, fisher_sums
from vestige.distributed import broadcast_from_rank0
from vestige.errors import UserError
from vestige.indexes import Index, IndexBlock
from vestige.launch import Compute, PieceFiles, phase, run_plan, step_done
from vestige.progress import format_bytes, progress
from vestige.settings import LaunchSettings
from vestige.storage import check_disk, make_folder, write_durably

GROUP_BYTES = 2**29
"""Stored gradients in one piece of work at least; more where the matrices themselves are large."""
FORMAT = 1
"""Raised when the numbers of the same index change their meaning."""


@dataclass(frozen=True)
class FisherPlan:
    """The Fisher blocks of all rows of an index, as a work plan.

    Each piece leaves `sum_i g_i g_i^T` of its shards for every component; the reduce adds them in the order of the
    pieces and divides by the rows, so the matrices do not depend on which process computed which piece.
    """

    index: Index
    name: str = "Curvature"
    unit: str = "examples"

    @property
    def folder(self) -> Path:
        """The index."""
        return self.index.folder

    @property
    def pieces(self) -> int:
        """Groups of shards."""
        return len(self._groups)

    def is_done(self, piece: int) -> bool:
        """Return whether the sums of this piece are there, or all have been added up."""
        return self._files.is_done(piece) or fisher_path(self.index).exists()

    def weight(self, piece: int) -> float:
        """Return the number of its rows."""
        return self.index.rows_of(self._groups[piece])

    def open(self) -> AbstractContextManager[Compute]:
        """Return a context with `compute`: nothing is needed but the index."""
        return nullcontext(self.compute)

    def compute(self, piece: int) -> None:
        """Write the sums of one piece."""
        self._files.write(piece, dict(zip(self._names, self._sums(piece, step_done), strict=True)))

    def reduce(self) -> FisherBlocks:
        """Return the blocks, stored beside the index; delete the pieces.

        Raises:
            CorruptFile: a piece is missing or damaged.
        """
        if (earlier := _read(self.index)) is not None:
            self._files.remove()
            return earlier
        totals = _zeros(self._columns)
        for piece in range(self.pieces):
            sums = self._files.read(piece)
            for total, name in zip(totals, self._names, strict=True):
                total += sums[name]
        found = self._kept(totals)
        self._files.remove()
        return found

    def forget_damaged(self) -> None:
        """Delete what an earlier run left damaged, so that it does not count as done."""
        if _read(self.index) is None:
            fisher_path(self.index).unlink(missing_ok=True)
        self._files.forget_damaged(range(self.pieces))

    def at_once(self) -> FisherBlocks:
        """Return the blocks of an index that is a single piece: nothing but the result touches the disk."""
        assert self.pieces == 1
        with phase(self.name, self.unit) as done, progress(self.index.rows, self.name) as bar:
            found = self._kept(self._sums(0, bar.advance))
            done.append(self.index.rows)
        return found

    @cached_property
    def _groups(self) -> list[range]:
        # The sums of a piece are written and read once: an eighth of what the piece reads at most.
        matrices = 4 * sum((part.stop - part.start) ** 2 for part in self._columns)
        return self.index.shard_groups(max(GROUP_BYTES, 8 * matrices))

    @cached_property
    def _files(self) -> PieceFiles:
        text = f"fisher {FORMAT} {self.index.fingerprint} {self._groups}"
        return PieceFiles(fisher_path(self.index).with_suffix(""), hashlib.sha256(text.encode()).hexdigest())

    @cached_property
    def _names(self) -> list[str]:
        return [span.name for span in self.index.spans]

    @cached_property
    def _columns(self) -> list[slice]:
        return [span.columns for span in self.index.spans]

    def _sums(self, piece: int, advance: Callable[[int], None]) -> list[Float[Tensor, "k k"]]:
        blocks = self.index.blocks(shards=self._groups[piece])
        return fisher_sums(self._columns, _counted(blocks, advance))

    def _kept(self, sums: list[Float[Tensor, "k k"]]) -> FisherBlocks:
        pairs = zip(self._names, sums, strict=True)
        counted = max(self.index.rows - len(self.index.skipped), 1)
        blocks = tuple(FisherBlock(name, total / counted) for name, total in pairs)
        path = fisher_path(self.index)
        make_folder(path.parent)
        check_disk(path.parent, self.index.manifest.curvature_bytes)
        write_durably(path, [save({block.name: block.matrix for block in blocks})])
        return FisherBlocks(blocks, tuple(self._columns))


def fisher_of(index: Index, launch: LaunchSettings | None = None, command: Sequence[str] | None = None) -> FisherBlocks:
    """Return the Fisher blocks of all rows of `index`; read from `curvature/` when they belong to just these shards.

    Args:
        index: A finished index.
        launch: Where to compute the pieces. Not given: in this process.
        command: What a worker runs to come here, as for `run_plan`.

    Raises:
        UserError: One matrix of all columns does not fit into memory.
    """
    if len(index.spans) == 1:
        require_memory(index.width)
    found = _read(index) if broadcast_from_rank0(fisher_path(index).exists) else None
    if found is not None:
        return found
    plan = FisherPlan(index)
    if plan.pieces == 1:
        return plan.at_once()
    plan.forget_damaged()
    with phase("Curvature", "examples") as done:
        done.extend(round(plan.weight(piece)) for piece in range(plan.pieces) if not plan.is_done(piece))
        return run_plan(plan, launch or LaunchSettings.model_validate({}), command)


def require_memory(width: int) -> None:
    """Raise unless a Fisher matrix of `width` columns and its factors, 28 bytes per pair of columns, fit into memory.

    Raises:
        UserError: They do not.
    """
    needed, available = 28 * width**2, psutil.virtual_memory().available
    if needed > available:
        raise UserError(
            f"One Fisher matrix over {width:,} columns needs {format_bytes(needed)} of memory, and "
            f"{format_bytes(available)} are free. Drop --option fisher=model, or make a narrower index."
        )


def fisher_path(index: Index) -> Path:
    """Return the path of the blocks of just these shards."""
    return index.folder / "curvature" / f"fisher-{index.fingerprint[:16]}.safetensors"


def _counted(blocks: Iterator[IndexBlock], advance: Callable[[int], None]) -> Iterator[Tensor]:
    for block in blocks:
        yield block.gradients
        advance(len(block.example))


def _zeros(columns: list[slice]) -> list[Float[Tensor, "k k"]]:
    return [torch.zeros(part.stop - part.start, part.stop - part.start) for part in columns]


def _read(index: Index) -> FisherBlocks | None:
    """Return the stored blocks, None if there are none or the file is damaged: they are cheap to compute again."""
    try:
        with safe_open(fisher_path(index), "pt") as file:
            blocks = tuple(FisherBlock(span.name, file.get_tensor(span.name)) for span in index.spans)
    except (FileNotFoundError, SafetensorError):
        return None
    return FisherBlocks(blocks, tuple(span.columns for span in index.spans))
