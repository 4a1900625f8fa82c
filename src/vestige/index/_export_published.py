"""An index in the layouts of other software: one `.pt` per iteration, or chunked memory maps.

Rows are in the order of the data, and the manifest is kept under the key `vestige` of the metadata, so that an import
finds the compression and its seed again. Other readers pass over it.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vestige.compress import parse_spec
from vestige.files import make_folder, write_durably
from vestige.index._export_rows import parts_in_order
from vestige.index._import_iterations import PROJECTIONS
from vestige.index._import_published import VESTIGE_KEY
from vestige.index._manifest import IMPORTED_SPEC, WHOLE_MODEL, IndexedComponent, Manifest, to_json
from vestige.index._store import Index

_ROWS_PER_BATCH = 16
_BATCHES_PER_CHUNK = 16


class _Sides(NamedTuple):
    output: int
    input: int


def write_projections(index: Index, out: Path) -> list[Path]:
    """`proj_iter_{i:06d}.pt` and `metadata.json`: layers by sorted name, in bfloat16 where the index is."""
    manifest = index.manifest
    layers = sorted(_layers(manifest), key=lambda part: part.name)
    columns = torch.cat([torch.arange(part.start, part.stop) for part in layers])
    dtype = torch.bfloat16 if manifest.dtype == "bfloat16" else torch.float32
    written = []
    for number, part in enumerate(parts_in_order(index, _ROWS_PER_BATCH)):
        path = out / f"{PROJECTIONS}_{number:06d}.pt"
        content = {
            "proj": part.gradients[:, columns].to(dtype),
            "iter": number,
            "batch_size": part.stop - part.start,
            "batch_idx": list(range(part.start, part.stop)),
        }
        write_durably(path, [_saved(content)])
        written.append(path)
    metadata = _projection_metadata(manifest, layers, str(dtype).removeprefix("torch."))
    write_durably(out / "metadata.json", [to_json(metadata)])
    return [*written, out / "metadata.json"]


def write_chunks(index: Index, out: Path) -> list[Path]:
    """`grad/chunk_gradients_{first}_{last}.mmap` with their metadata, and `batch_metadata.json`, in float32."""
    manifest, folder = index.manifest, out / "grad"
    make_folder(folder)
    dims = [part.stop - part.start for part in _layers(manifest)]
    written, batch = [], 0
    for part in parts_in_order(index, _ROWS_PER_BATCH * _BATCHES_PER_CHUNK):
        rows = part.stop - part.start
        starts = range(0, rows, _ROWS_PER_BATCH)
        batches = [
            {"batch_idx": batch + at, "start_row": start, "end_row": min(start + _ROWS_PER_BATCH, rows)}
            for at, start in enumerate(starts)
        ]
        stem = f"chunk_gradients_{batch}_{batch + len(starts) - 1}"
        metadata = {
            "shape": [rows, index.width],
            "storage_dtype": "float32",
            "layer_dims": dims,
            "batches": batches,
        }
        # The numbers first: metadata that are there vouch for a whole map.
        write_durably(folder / f"{stem}.mmap", [part.gradients.contiguous().numpy().data])
        write_durably(folder / f"{stem}_metadata.json", [to_json(metadata)])
        written += [folder / f"{stem}.mmap", folder / f"{stem}_metadata.json"]
        batch += len(starts)
    info = [
        {
            "batch_idx": number,
            "start_idx": number * _ROWS_PER_BATCH,
            "end_idx": min((number + 1) * _ROWS_PER_BATCH, index.rows),
        }
        for number in range(batch)
    ]
    summary = {
        "batch_info": info,
        "layer_names": [part.name for part in _layers(manifest)],
        "layer_dims": dims,
        "total_batches": batch,
        "total_samples": index.rows,
        VESTIGE_KEY: manifest.model_dump(mode="json"),
    }
    write_durably(out / "batch_metadata.json", [to_json(summary)])
    return [*written, out / "batch_metadata.json"]


def _layers(manifest: Manifest) -> Sequence[IndexedComponent]:
    """What these layouts call layers: the components, or one for the whole model where they were added up."""
    if manifest.compression.scope == "component":
        return manifest.components
    width = manifest.width
    return [IndexedComponent(name=WHOLE_MODEL, kind="model", shape=(1, width), start=0, stop=width)]


def _projection_metadata(manifest: Manifest, parts: Sequence[IndexedComponent], dtype: str) -> dict[str, Any]:
    layers, start = [], 0
    for part in parts:
        total = part.stop - part.start
        sides = _sides(manifest, part)
        layers.append(
            {
                "name": part.name,
                "type": part.kind,
                "k_i": sides.input,
                "k_o": sides.output,
                "k_total": total,
                "n_o": part.shape[0],
                "n_i": part.shape[1],
                "slice_start": start,
                "slice_end": start + total,
            }
        )
        start += total
    totals = [layer["k_total"] for layer in layers]
    return {
        "engine": "Vestige",
        "proj_seed": manifest.seed,
        "proj_dtype": dtype,
        "proj_method": manifest.compression.spec,
        "proj_rank_total": max(totals),
        "proj_rank_min": min(min(layer["k_i"], layer["k_o"]) for layer in layers),
        "total_proj_dim": start,
        "layers": layers,
        VESTIGE_KEY: manifest.model_dump(mode="json"),
    }


def _sides(manifest: Manifest, part: IndexedComponent) -> _Sides:
    """Sizes of both sides where each was projected for itself; one side of all columns elsewhere."""
    total = part.stop - part.start
    if manifest.compression.spec == IMPORTED_SPEC or manifest.compression.scope == "model":
        return _Sides(1, total)
    compressor = parse_spec(manifest.compression.spec).build(part.name, part.shape, manifest.seed)
    left, right = compressor.left.out_size, compressor.right.out_size
    return _Sides(left, right) if left * right == total else _Sides(1, total)


def _saved(content: dict[str, Any]) -> bytes:
    stream = io.BytesIO()
    # A view would be saved with the whole of what it looks at.
    torch.save({name: value.clone() if isinstance(value, Tensor) else value for name, value in content.items()}, stream)
    return stream.getvalue()
