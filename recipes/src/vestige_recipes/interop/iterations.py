"""Gradients with one file for each iteration: `proj_iter_*.pt`, `fullgrad_iter_*.pt`, with their metadata.

The columns of a projection are laid out by the slices in the metadata: names are sorted as text there, so that layer
10 comes before layer 2, and neither the order of the list nor of the module tree says where a layer lies.
"""

import io
import math
import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vestige.errors import DataError, SpecError
from vestige.indexes import IMPORTED_SPEC, Index, IndexedComponent, Manifest, parts_in_order
from vestige.storage import write_durably
from vestige_recipes.interop.published import (
    ROWS_PER_BATCH,
    VESTIGE_KEY,
    Metadata,
    Published,
    check_number,
    lay_out,
    layers_to_write,
    load_object,
    missing_note,
    name_type,
    read_metadata,
    write_json,
)

PROJECTIONS, FULL_GRADIENTS = "proj_iter", "fullgrad_iter"
_TRANSPOSED = "conv1d"
"""Kind of the components whose parameter is [in, out]."""
UNTRUSTED = (
    "The files do not say which example a row is: the published `batch_idx` counts batches that were drawn with "
    "replacement. Rows are in the order of the iterations."
)


def read_projections(folder: Path) -> Published:
    """Return projected gradients: `proj_iter_{i:06d}.pt` {proj, iter, batch_size} and `metadata.json`."""
    metadata = read_metadata(folder / "metadata.json")
    layers = [_layer(Metadata(layer, metadata.path)) for layer in metadata.entries("layers")]
    width = metadata.number("total_proj_dim")
    return _build_published("projections", metadata.path, layers, width, metadata.manifest())


def read_full_gradients(folder: Path) -> Published:
    """Return exact gradients: `fullgrad_iter_{i:06d}.pt` {grad, iter, batch_size} and `fullgrad_meta.json`."""
    metadata = read_metadata(folder / "fullgrad_meta.json")
    slices, path = metadata.field("param_slices"), metadata.path
    if not isinstance(slices, dict) or not slices:
        raise DataError(f"{path}: `param_slices` is no object of slices by name. Copy the file again.")
    parts = []
    for name, content in slices.items():
        place = Metadata(content, path)
        shape = _matrix_shape(place.field("shape"), path)
        start, stop = place.number("start"), place.number("end")
        parts.append(IndexedComponent(name=name, kind="parameter", shape=shape, start=start, stop=stop))
    return _build_published("fullgrads", path, parts, metadata.number("total_param_dim"), None)


def _build_published(
    layout: str, metadata: Path, parts: list[IndexedComponent], width: int, made_by: Manifest | None
) -> Published:
    components, places = lay_out(parts, width, made_by, metadata)
    stem, key = (PROJECTIONS, "proj") if layout == "projections" else (FULL_GRADIENTS, "grad")
    files = _files(metadata.parent, stem)
    rows, dtype = _check(files, key, width)
    numbers, paths = [number for number, _ in files], [path for _, path in files]
    names = [f"{number}:{place}" for number, count in zip(numbers, rows, strict=True) for place in range(count)]

    # Batches are read in order: one file is in memory at a time.
    @lru_cache(maxsize=1)
    def content(file: int) -> Tensor:
        tensor = load_object(paths[file], dict)[key]
        return tensor if tensor.dim() == 2 else tensor[None]

    return Published(
        layout=layout,
        components=components,
        dtype=name_type(dtype, paths[0]),
        names=names,
        counts=rows,
        load=lambda file, inside: content(file)[torch.from_numpy(inside)],
        places=places,
        files=[metadata, *paths],
        # What an export of ours says in `batch_idx` is true; the rows are written in the order of the data.
        notes=[*([] if made_by is not None else [UNTRUSTED]), *_gaps(numbers)],
        made_by=made_by,
    )


def _layer(layer: Metadata) -> IndexedComponent:
    start, stop = layer.number("slice_start"), layer.number("slice_end")
    name, total = str(layer.field("name")), layer.number("k_total")
    if stop - start != total:
        raise DataError(
            f"{layer.path}: layer {name} has k_total {total}, and its slice {start}:{stop} is {stop - start}."
        )
    shape = layer.number("n_o"), layer.number("n_i")
    return IndexedComponent(name=name, kind=str(layer.field("type")), shape=shape, start=start, stop=stop)


def _matrix_shape(shape: Any, path: Path) -> tuple[int, int]:
    given = shape if isinstance(shape, list) else [shape]
    sizes = [check_number(size, "a size in `shape`", path) for size in given]
    rows = sizes[0] if sizes else 1
    return rows, check_number(math.prod(sizes) // max(rows, 1), "a product of `shape`", path)


def _files(folder: Path, stem: str) -> list[tuple[int, Path]]:
    """Return the files in the order of their numbers, which is not that of their names beyond 999,999."""
    found = []
    for path in folder.glob(f"{stem}_*.pt"):
        match = re.fullmatch(rf"{stem}_(\d+)\.pt", path.name)
        if match is None:
            raise DataError(f"{path} has no iteration in its name. Expected {stem}_000012.pt; move it elsewhere.")
        found.append((int(match[1]), path))
    if not found:
        raise DataError(f"{folder} holds no {stem}_*.pt. Give the folder in which they lie.")
    return sorted(found)


def _check(files: list[tuple[int, Path]], key: str, width: int) -> tuple[list[int], torch.dtype]:
    """Read every file once, before anything is written; return the rows of each, and their number format."""
    rows, dtypes = [], set()
    for number, path in files:
        content = Metadata(load_object(path, dict), path)
        tensor = content.field(key)
        if not isinstance(tensor, Tensor) or tensor.shape[-1:] != (width,) or tensor.dim() > 2:
            shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise DataError(f"{path}: `{key}` is {shape}, expected [rows, {width}] as the metadata say.")
        count = len(tensor) if tensor.dim() == 2 else 1
        if (iteration := content.number("iter")) != number:
            raise DataError(f"{path} says that it is iteration {iteration}, and its name says {number}.")
        if (size := content.number("batch_size")) != count:
            raise DataError(f"{path} holds {count} rows, and says batch_size {size}: it is not whole.")
        rows.append(count)
        dtypes.add(tensor.dtype)
    if len(dtypes) > 1:
        raise DataError(f"The files of {files[0][1].parent} hold numbers in several formats: {dtypes}.")
    return rows, dtypes.pop()


def _gaps(numbers: list[int]) -> list[str]:
    note = missing_note(numbers, numbers[0], numbers[-1] + 1, "iterations are missing between the others")
    steps = {after - before for before, after in pairwise(numbers)}
    if note is not None and len(steps) == 1:
        note += f" Every {steps.pop()}th iteration was saved; the published software loses those between."
    return [] if note is None else [note]


def write_projections(index: Index, out: Path) -> list[Path]:
    """Write `proj_iter_{i:06d}.pt` and `metadata.json`: layers by sorted name, in bfloat16 where the index is."""
    manifest = index.manifest
    layers = sorted(layers_to_write(manifest), key=lambda part: part.name)
    columns = torch.cat([torch.arange(part.start, part.stop) for part in layers])
    dtype = torch.bfloat16 if manifest.dtype == "bfloat16" else torch.float32
    written = []
    for number, (part, gradients) in enumerate(parts_in_order(index, ROWS_PER_BATCH)):
        content = {
            # Indexing copies: a view would be saved with the whole of what it looks at.
            "proj": gradients[:, columns].to(dtype),
            "iter": number,
            "batch_size": part.stop - part.start,
            "batch_idx": list(range(part.start, part.stop)),
        }
        written.append(_write_tensors(out / f"{PROJECTIONS}_{number:06d}.pt", content))
    metadata = _projection_metadata(index, layers, str(dtype).removeprefix("torch."))
    return [*written, write_json(out / "metadata.json", metadata)]


def write_full_gradients(index: Index, out: Path) -> list[Path]:
    """Write `fullgrad_iter_{i:06d}.pt`, one example each in float32, and `fullgrad_meta.json` with the parameters.

    A GPT-2 Conv1D weight lies there as the model holds it, [in, out].

    Raises:
        SpecError: The index holds compressed gradients.
    """
    manifest = index.manifest
    if manifest.compression.spec == IMPORTED_SPEC or index.spec.stages:
        raise SpecError(f"{index.folder} holds compressed gradients. Give an index made with --compress none.")
    slices, written = {}, list[Path]()
    for part in manifest.components:
        shape = [part.shape[0]] if part.shape[1] == 1 else list(part.shape)[:: -1 if part.kind == _TRANSPOSED else 1]
        place = {"start": part.start, "end": part.stop, "numel": part.stop - part.start, "shape": shape}
        slices[part.name] = place
    for rows, gradients in parts_in_order(index, ROWS_PER_BATCH):
        for number, gradient in zip(range(rows.start, rows.stop), gradients.float(), strict=True):
            parts = [gradient[part.start : part.stop].view(part.shape) for part in manifest.components]
            kinds = [part.kind for part in manifest.components]
            laid = [one.T if kind == _TRANSPOSED else one for one, kind in zip(parts, kinds, strict=True)]
            content = {"grad": torch.cat([one.reshape(-1) for one in laid]), "iter": number, "batch_size": 1}
            written.append(_write_tensors(out / f"{FULL_GRADIENTS}_{number:06d}.pt", content))
    metadata = {"total_param_dim": manifest.width, "param_slices": slices}
    return [*written, write_json(out / "fullgrad_meta.json", metadata)]


def _write_tensors(path: Path, content: dict[str, Any]) -> Path:
    stream = io.BytesIO()
    torch.save(content, stream)
    write_durably(path, [stream.getvalue()])
    return path


def _projection_metadata(index: Index, parts: Sequence[IndexedComponent], dtype: str) -> dict[str, Any]:
    manifest, layers, start = index.manifest, [], 0
    for part in parts:
        total = part.stop - part.start
        output_side, input_side = _sides(index, part)
        layers.append(
            {
                "name": part.name,
                "type": part.kind,
                "k_i": input_side,
                "k_o": output_side,
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
        "proj_rank_min": _least_rank(index, layers),
        "total_proj_dim": start,
        "layers": layers,
        VESTIGE_KEY: manifest.model_dump(mode="json"),
    }


def _least_rank(index: Index, layers: Sequence[dict[str, Any]]) -> int:
    """Return the least rank of a side that was asked for; where none was, the least there is."""
    known = index.manifest.compression.spec != IMPORTED_SPEC
    for stage in index.spec.stages if known else ():
        if "min" in (options := stage.kind.with_defaults(dict(stage.options))) and len(stage.size) == 1:
            return int(options["min"])
    return min(min(layer["k_i"], layer["k_o"]) for layer in layers)


def _sides(index: Index, part: IndexedComponent) -> tuple[int, int]:
    """Return output and input size where each side was projected for itself; one side of all columns elsewhere."""
    total, manifest = part.stop - part.start, index.manifest
    if manifest.compression.spec == IMPORTED_SPEC or manifest.compression.scope == "model":
        return 1, total
    compressor = index.spec.build(part.name, part.shape, manifest.seed)
    left, right = compressor.left.out_size, compressor.right.out_size
    return (left, right) if left * right == total else (1, total)
