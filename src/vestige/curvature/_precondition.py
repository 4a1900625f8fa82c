"""Curvature of an index on disk: its Fisher blocks, and their damped inverse applied to the gradients.

`vestige attribute` preconditions the few queries and needs the blocks alone. The preconditioned gradient of every row
is for programs that work on `(F + d I)^-1 g` itself, such as clustering or a search for neighbours under the curvature.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vestige.curvature._fisher import (
    DampedInverse,
    FisherBlock,
    FisherBlocks,
    SavedPieces,
    add_pieces,
    fisher_sums,
    read_tensors,
)
from vestige.distributed import broadcast_from_rank0
from vestige.errors import CorruptFile, IndexMismatch, UserError
from vestige.indexes import PRECONDITIONED, WHOLE_MODEL, Index, Span
from vestige.jobs import JOB_FILES, PieceFiles, Tensors, phase, profile, step_done, worker_command, write_profile
from vestige.parsing import parse_object
from vestige.progress import format_bytes
from vestige.settings import LaunchSettings, PreconditionSettings, with_settings
from vestige.storage import check_disk, make_folder, remove_durably, require_no_others, write_durably

GROUP_BYTES = 2**29
"""Stored gradients in one piece of work at least; more where the matrices themselves are large."""
FISHER_FORMAT = ROWS_FORMAT = 1
"""Raised when the numbers of the same index change their meaning."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_OURS = (f"{'[0-9]' * 5}.json", f"{'[0-9]' * 5}.safetensors", PRECONDITIONED, "profile.json", *JOB_FILES)


@with_settings(PreconditionSettings)
def precondition(settings: PreconditionSettings) -> FisherBlocks:
    """Compute the Fisher matrix of every component of an index; with `out` also `(F + d I)^-1 g` of every row.

    The matrices are kept beside the index. `vestige attribute --method influence` does the first by itself when it is
    missing, and never needs the second. Killed at any moment, the same call continues.

    Raises:
        UserError: Something about the index, the damping or the disk needs the caller.
    """
    index, command = Index.open(settings.index), worker_command(settings, "precondition")
    with profile(settings.profile) as measured:
        fisher = fisher_of(index, settings, command)
        with phase("Inverse", "components") as done:
            inverse = fisher.inverse(settings.damping)
            done.append(len(fisher.blocks))
        if settings.out is not None:
            _precondition_rows(index, inverse, settings, command)
    write_profile(measured, settings.out or index.folder / "curvature")
    return fisher


def fisher_of(
    index: Index,
    settings: LaunchSettings | None = None,
    command: Sequence[str] | None = None,
    device: torch.device | None = None,
    *,
    whole: bool = False,
) -> FisherBlocks:
    """Return the Fisher blocks of all rows of `index`; read from `curvature/` when they belong to just these shards.

    Args:
        index: A finished index.
        settings: Where to compute the pieces. Not given: in this process.
        command: What a worker runs to come here, as for `run_pieces`.
        device: Where the products are taken. Not given: on the CPU.
        whole: Return one matrix of all columns, between components too.

    Raises:
        UserError: One matrix of all columns and its factors, 28 bytes for each pair of columns, do not fit into memory.
    """
    spans, path = _blocks_of(index, whole)
    if len(spans) == 1:
        _require_memory(index.width)
    found = read_tensors(path) if broadcast_from_rank0(path.exists) else None
    if found is None:
        plan = plan_fisher(index, device, whole=whole)
        if len(plan.weights) > 1:
            found = plan.run(settings, command)
        else:
            with phase(plan.name, plan.unit) as done:
                found = plan.run_in_memory()
                done.append(index.rows)
    blocks = tuple(FisherBlock(span.name, found[span.name]) for span in spans)
    return FisherBlocks(blocks, tuple(span.columns for span in spans))


def plan_fisher(index: Index, device: torch.device | None = None, *, whole: bool = False) -> SavedPieces:
    """Return the plan of the Fisher blocks: a piece leaves `sum_i g_i g_i^T` of its shards for every component."""
    spans, path = _blocks_of(index, whole)
    columns = [span.columns for span in spans]
    # The sums of a piece are written and read once: an eighth of what the piece reads at most.
    matrices = 4 * sum((part.stop - part.start) ** 2 for part in columns)
    groups = index.shard_groups(max(GROUP_BYTES, 8 * matrices))
    # Sums that a card and a CPU computed, which differ by rounding, do not mix.
    place = "" if device is None or device.type == "cpu" else f" {device.type}"
    text = f"fisher {FISHER_FORMAT} {index.fingerprint} {groups}{place}"

    def compute(piece: int) -> Tensors:
        def gradients() -> Iterator[Tensor]:
            for block in index.blocks(shards=groups[piece], device=device):
                yield block.gradients
                step_done(len(block.example))

        return {span.name: total for span, total in zip(spans, fisher_sums(columns, gradients())[0], strict=True)}

    def combine(parts: Iterable[Tensors]) -> Tensors:
        # The rows of examples that were left out hold zeros.
        counted = max(index.rows - len(index.skipped), 1)
        found = {name: total / counted for name, total in add_pieces(parts).items()}
        make_folder(path.parent)
        check_disk(path.parent, matrices)
        return found

    return SavedPieces(
        "Whole curvature" if whole else "Curvature",
        index.folder,
        PieceFiles(path.with_suffix(""), hashlib.sha256(text.encode()).hexdigest()),
        [index.rows_of(group) for group in groups],
        compute,
        combine,
        result=path,
    )


def fisher_path(index: Index, *, whole: bool = False) -> Path:
    """Return the path of the blocks of just these shards."""
    return index.folder / "curvature" / f"fisher-{'model-' if whole else ''}{index.fingerprint[:16]}.safetensors"


def _blocks_of(index: Index, whole: bool) -> tuple[Sequence[Span], Path]:
    """Return the columns of each block, and the file of the blocks; the only block of an index is the whole."""
    if len(index.spans) == 1 or not whole:
        return index.spans, fisher_path(index)
    return [Span(WHOLE_MODEL, slice(0, index.width))], fisher_path(index, whole=True)


def _require_memory(width: int) -> None:
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


class PreconditionedBlock(NamedTuple):
    """Preconditioned gradients of one shard of an index."""

    example: Int[Tensor, "row"]
    """Positions of the rows' examples in the data."""
    gradients: Float[Tensor, "row column"]
    """`(F + d I)^-1 g`, columns as in the index."""


def _precondition_rows(
    index: Index, inverse: DampedInverse, settings: PreconditionSettings, command: list[str] | None
) -> None:
    """Write `(F + d I)^-1 g` of every row, one file for each shard, and the record when all files are there."""
    assert settings.out is not None
    folder, dtype, rows = settings.out, _DTYPES[settings.dtype], index.manifest.shard_rows
    text = f"preconditioned {ROWS_FORMAT} {index.fingerprint} {settings.damping!r} {settings.dtype}"
    files = PieceFiles(folder, hashlib.sha256(text.encode()).hexdigest())
    record = {
        "format": ROWS_FORMAT,
        "input": files.input,
        "index": index.fingerprint,
        "damping": settings.damping,
        "dtype": settings.dtype,
        "files": len(rows),
        "rows": index.rows,
        "components": [[part.name, part.start, part.stop] for part in index.manifest.components],
    }

    def compute(piece: int) -> Tensors:
        example, solved = [], []
        for block in index.blocks(shards=range(piece, piece + 1)):
            example.append(block.example)
            solved.append(inverse.apply(block.gradients).to(dtype))
            step_done(len(block.example))
        return {"example": torch.cat(example), "gradients": torch.cat(solved)}

    def combine(_: Iterable[Tensors]) -> Tensors:
        for piece in range(len(rows)):
            files.check(piece)
        write_durably(folder / PRECONDITIONED, [(json.dumps(record, indent=1) + "\n").encode()])
        return {}

    plan = SavedPieces("Preconditioning", folder, files, rows, compute, combine)
    _require_ours(folder, record)
    files.forget_damaged(range(len(rows)))
    missing = sum(rows[piece] for piece in range(len(rows)) if not files.is_done(piece))
    check_disk(folder, missing * (index.width * dtype.itemsize + 8))
    make_folder(folder)
    plan.run(settings, command)


def read_preconditioned(folder: str | Path) -> Iterator[PreconditionedBlock]:
    """Yield what `vestige precondition --out` left, shard by shard; every file is compared with its checksum.

    Raises:
        UserError: nothing is there, or not all of it.
        CorruptFile: a file is damaged.
    """
    record = _require_record(Path(folder))
    files = PieceFiles(Path(folder), record["input"])
    for piece in range(record["files"]):
        yield PreconditionedBlock(**files.read(piece))


def preconditioned_layout(folder: str | Path) -> tuple[int, list[Span]]:
    """Return the number of rows that `vestige precondition --out` left, and the columns of each component.

    Components that were added up are one, under the name `WHOLE_MODEL`.

    Raises:
        UserError: nothing is there, or not all of it.
        CorruptFile: The record does not read.
    """
    record = _require_record(Path(folder))
    spans = [Span(name, slice(start, stop)) for name, start, stop in record["components"]]
    if any(span.columns.start == 0 for span in spans[1:]):
        spans = [Span(WHOLE_MODEL, spans[0].columns)]
    return record["rows"], spans


def _require_record(folder: Path) -> dict[str, Any]:
    record = _read_record(folder)
    if record is None:
        raise UserError(
            f"There are no complete preconditioned gradients in {folder}. Make or complete them with: "
            f"vestige precondition INDEX --out {folder}"
        )
    types = {"input": str, "files": int, "rows": int, "components": list}
    if not all(isinstance(record.get(name), of_type) for name, of_type in types.items()):
        raise CorruptFile(f"{folder / PRECONDITIONED} is not what Vestige writes. Run `vestige precondition` again.")
    return record


def _read_record(folder: Path) -> dict[str, Any] | None:
    try:
        return parse_object((folder / PRECONDITIONED).read_bytes())
    except (OSError, ValueError):
        return None


def _require_ours(folder: Path, record: dict[str, Any]) -> None:
    """Raise unless the folder is absent, empty, or holds these files or their beginning."""
    require_no_others(folder, _OURS)
    old = _read_record(folder)
    if old is not None and old.get("input") != record["input"]:
        differing = ", ".join(key for key in ("index", "damping", "dtype") if old.get(key) != record[key])
        raise IndexMismatch(
            f"{folder} holds preconditioned gradients with another {differing}; nothing was changed. "
            "Give another --out, or delete that folder."
        )
    if old is None and (folder / PRECONDITIONED).exists():
        remove_durably(folder / PRECONDITIONED)
