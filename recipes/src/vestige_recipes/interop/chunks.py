"""Gradients in chunked memory maps: `chunk_gradients_{first}_{last}.mmap` with a metadata file each.

The published writer puts the metadata of a chunk on disk before its numbers and never marks a chunk as done, so a
killed run leaves maps that are too short or hold zeros; both are looked for before anything is imported.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vestige.curvature import preconditioned_layout, read_preconditioned
from vestige.errors import DataError
from vestige.indexes import Index, IndexedComponent, parts_in_order
from vestige.storage import make_folder, write_durably
from vestige_recipes.interop.published import (
    ROWS_PER_BATCH,
    VESTIGE_KEY,
    Metadata,
    Published,
    check_number,
    lay_out,
    layers_to_write,
    missing_note,
    name_type,
    read_metadata,
    write_json,
)

KINDS = {"gradients": "grad", "ifvp": "ifvp"}
"""What a chunk may hold, and the folder in which it is published."""
_BATCHES_PER_CHUNK = 16
"""Of an export."""
_TYPES = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2"), "bfloat16": np.dtype("<u2")}


class _Chunk(NamedTuple):
    first: int
    last: int
    path: Path
    metadata: Path
    rows: int
    layer_dims: tuple[int, ...]
    dtype: str
    batches: list[tuple[int, int, int]]
    """Number, first row, and one more than the last row."""

    def numbers(self) -> np.ndarray:
        """Return the map [row, column]; bfloat16 as the raw 16 bits."""
        return np.memmap(self.path, dtype=_TYPES[self.dtype], mode="r", shape=(self.rows, sum(self.layer_dims)))

    def read(self, rows: Int[np.ndarray, "row"]) -> Float[Tensor, "row column"]:
        """Return rows as a tensor."""
        values = np.array(self.numbers()[rows])
        if self.dtype == "bfloat16":
            return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16).float()
        return torch.from_numpy(values).float()


def read_chunks(folder: Path) -> Published:
    """Return compressed gradients, or inverse-Fisher-vector products, from a cache of the published phases."""
    kind, within = _kind(folder)
    chunks = _chunks(within, kind)
    summary = _read_summary(within)
    first = chunks[0]
    names, notes = _layer_names(summary, first.layer_dims)
    made_by = summary.manifest()
    ends = np.cumsum(first.layer_dims).tolist()
    parts = [
        # The layout keeps no shape of a layer.
        IndexedComponent(name=name, kind="layer", shape=(1, size), start=end - size, stop=end)
        for name, size, end in zip(names, first.layer_dims, ends, strict=True)
    ]
    components, places = lay_out(parts, ends[-1], made_by, summary.path)
    if made_by is None:
        notes.append("The files do not say which example a row is. Rows are in the order of the batches.")
    if kind == "ifvp":
        notes.append("Rows are inverse-Fisher-vector products, not gradients: their products are influence.")
    notes += [*_missing_batches(chunks, summary), *_zero_rows(chunks)]
    rows = [
        f"{batch}:{place}" for chunk in chunks for batch, start, stop in chunk.batches for place in range(stop - start)
    ]
    files = [file for chunk in chunks for file in (chunk.metadata, chunk.path)]
    return Published(
        layout="chunks",
        components=components,
        dtype=name_type(getattr(torch, first.dtype), first.path),
        names=rows,
        counts=[chunk.rows for chunk in chunks],
        load=lambda chunk, inside: chunks[chunk].read(inside),
        places=places,
        files=files if summary.content is None else [summary.path, *files],
        notes=notes,
        made_by=made_by,
    )


def _read_summary(within: Path) -> Metadata:
    """Return what stands beside the chunks or above them; its content is None where nothing does."""
    for folder in (within, within.parent):
        if (folder / "batch_metadata.json").is_file():
            return read_metadata(folder / "batch_metadata.json")
    return Metadata(None, within / "batch_metadata.json")


def _kind(folder: Path) -> tuple[str, Path]:
    """Return what the chunks hold, and where they lie; gradients before products with them."""
    for kind, name in KINDS.items():
        for place in (folder, folder / name):
            if place.is_dir() and any(place.glob(f"chunk_{kind}_*")):
                return kind, place
    raise DataError(f"{folder} holds no chunk_gradients_*.mmap, nor does its folder grad. Give the cache's folder.")


def _chunks(folder: Path, kind: str) -> list[_Chunk]:
    pattern = re.compile(rf"chunk_{kind}_(\d+)_(\d+)(\.mmap|_metadata\.json)")
    stems = {}
    for path in sorted(folder.glob(f"chunk_{kind}_*")):
        if (match := pattern.fullmatch(path.name)) is not None:
            stems[int(match[1]), int(match[2])] = path.name.removesuffix(match[3])
    found = [_chunk(folder, stems[span], *span) for span in sorted(stems)]
    for before, after in pairwise(found):
        if after.first <= before.last:
            raise DataError(f"{after.path} and {before.path} both hold batch {after.first}. Remove one of them.")
        if (after.layer_dims, after.dtype) != (before.layer_dims, before.dtype):
            raise DataError(f"{after.metadata} has other layer_dims or another storage_dtype than {before.metadata}.")
    return found


def _chunk(folder: Path, stem: str, first: int, last: int) -> _Chunk:
    path, metadata = folder / f"{stem}.mmap", folder / f"{stem}_metadata.json"
    content = read_metadata(metadata)
    if not path.is_file():
        raise DataError(f"{path} is missing, though {metadata.name} is there: its writer was killed. Compute it again.")
    shape, sizes = content.entries("shape"), content.field("layer_dims")
    sizes = list(sizes.values()) if isinstance(sizes, dict) else content.entries("layer_dims")
    dims = tuple(check_number(size, "a size in `layer_dims`", metadata) for size in sizes)
    shape = [check_number(size, "a size in `shape`", metadata) for size in shape]
    dtype = str(content.field("storage_dtype")).removeprefix("torch.")
    if dtype not in _TYPES:
        raise DataError(f"{metadata}: storage_dtype {dtype} is not known. Expected one of: {', '.join(_TYPES)}.")
    if len(shape) != 2 or shape[1] != sum(dims) or shape[0] < 1:
        raise DataError(f"{metadata}: shape {shape} is not [rows, {sum(dims)}], the sum of layer_dims.")
    expected, size = shape[0] * shape[1] * _TYPES[dtype].itemsize, path.stat().st_size
    if size != expected:
        raise DataError(f"{path} has {size:,} bytes, expected {expected:,} for shape {shape}: it is not whole.")
    entries = [Metadata(entry, metadata) for entry in content.entries("batches")]
    batches = [(entry.number("batch_idx"), entry.number("start_row"), entry.number("end_row")) for entry in entries]
    if [start for _, start, _ in batches] != [0, *(stop for _, _, stop in batches)][:-1] or batches[-1][2] != shape[0]:
        raise DataError(f"{metadata}: the rows of its batches do not follow one another from 0 to {shape[0]}.")
    return _Chunk(first, last, path, metadata, int(shape[0]), dims, dtype, batches)


def _layer_names(summary: Metadata, dims: tuple[int, ...]) -> tuple[list[str], list[str]]:
    """Return the names in the order of the columns, which here is that of the model's modules; and notes."""
    if summary.content is None:
        note = f"{summary.path.name} is missing, which holds the names of the layers: they are numbered in their order."
        return [f"layer_{number}" for number in range(len(dims))], [note]
    names = [str(name) for name in summary.entries("layer_names")]
    if len(names) != len(dims):
        raise DataError(f"{summary.path} names {len(names)} layers, and the chunks have {len(dims)}.")
    return names, []


def _missing_batches(chunks: list[_Chunk], summary: Metadata) -> list[str]:
    held = [batch for chunk in chunks for batch, _, _ in chunk.batches]
    if len(set(held)) != len(held):
        raise DataError(f"{summary.path.parent}: a batch is in two chunks.")
    total = summary.content.get("total_batches") if isinstance(summary.content, dict) else None
    stop = total if isinstance(total, int) and not isinstance(total, bool) else max(held) + 1
    note = missing_note(held, 0, max(stop, 0), "batches are missing")
    return [] if note is None else [note]


def _zero_rows(chunks: list[_Chunk]) -> list[str]:
    """Refuse a batch of zeros, which was never written; note single rows of zeros, which may have no target."""
    empty: list[str] = []
    for chunk in chunks:
        numbers = chunk.numbers()
        for batch, start, stop in chunk.batches:
            zero = ~numbers[start:stop].any(axis=1)
            if zero.all() and stop - start > 1:
                raise DataError(
                    f"{chunk.path}: all {stop - start} rows of batch {batch} are zero: they were never written. "
                    "Remove the chunk and its metadata file, and compute it again."
                )
            empty += [f"{batch}:{place}" for place in np.flatnonzero(zero)]
    return [f"{len(empty)} rows are zero: {', '.join(empty[:8])}."] if empty else []


def write_chunks(index: Index, out: Path) -> list[Path]:
    """Write `grad/chunk_gradients_{first}_{last}.mmap` with their metadata, and `batch_metadata.json`, in float32."""
    layers = [(part.name, part.stop - part.start) for part in layers_to_write(index.manifest)]
    parts = parts_in_order(index, ROWS_PER_BATCH * _BATCHES_PER_CHUNK)
    made_by = {VESTIGE_KEY: index.manifest.model_dump(mode="json")}
    return _write(out, "gradients", layers, (gradients for _, gradients in parts), index.rows, made_by)


def write_ifvp(folder: Path, out: Path) -> list[Path]:
    """Write `ifvp/chunk_ifvp_{first}_{last}.mmap` of what `vestige precondition --out` left, rows as in the data."""
    rows, spans = preconditioned_layout(folder)
    width, step = spans[-1].columns.stop, ROWS_PER_BATCH * _BATCHES_PER_CHUNK
    layers = [(span.name, span.columns.stop - span.columns.start) for span in spans]
    with TemporaryDirectory(dir=out) as held:
        whole = np.memmap(Path(held) / "rows", dtype="<f4", mode="w+", shape=(rows, width))
        for block in read_preconditioned(folder):
            whole[block.example.numpy()] = block.gradients.float().numpy()
        parts = (torch.from_numpy(whole[start : start + step]) for start in range(0, rows, step))
        return _write(out, "ifvp", layers, parts, rows, {})


def _write(
    out: Path,
    kind: str,
    layers: Sequence[tuple[str, int]],
    parts: Iterable[Float[Tensor, "row column"]],
    count: int,
    made_by: Mapping[str, Any],
) -> list[Path]:
    """Write the parts, a chunk each; `layers` have a name and a number of columns."""
    folder = out / KINDS[kind]
    make_folder(folder)
    names, dims = zip(*layers, strict=True)
    written, batch = [], 0
    for rows in parts:
        starts = range(0, len(rows), ROWS_PER_BATCH)
        batches = [
            {"batch_idx": batch + at, "start_row": start, "end_row": min(start + ROWS_PER_BATCH, len(rows))}
            for at, start in enumerate(starts)
        ]
        stem = f"chunk_{kind}_{batch}_{batch + len(starts) - 1}"
        metadata = {"shape": list(rows.shape), "storage_dtype": "float32", "layer_dims": dims, "batches": batches}
        # The numbers first: metadata that are there vouch for a whole map.
        write_durably(folder / f"{stem}.mmap", [rows.contiguous().numpy().data])
        written += [folder / f"{stem}.mmap", write_json(folder / f"{stem}_metadata.json", metadata)]
        batch += len(starts)
    summary = {
        "batch_info": [
            {"batch_idx": number, "start_idx": start, "end_idx": min(start + ROWS_PER_BATCH, count)}
            for number, start in enumerate(range(0, batch * ROWS_PER_BATCH, ROWS_PER_BATCH))
        ],
        "layer_names": names,
        "layer_dims": dims,
        "total_batches": batch,
        "total_samples": count,
        **made_by,
    }
    return [*written, write_json(out / "batch_metadata.json", summary)]
