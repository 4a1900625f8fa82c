"""Gradients with one file per iteration: `proj_iter_*.pt` with `metadata.json`, `fullgrad_iter_*.pt` with its own.

The columns of a projection are laid out by the slices in the metadata: names are sorted as text there, so that layer
10 comes before layer 2, and neither the order of the list nor of the module tree says where a layer lies.
"""

import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vestige.errors import DataError
from vestige.index._import_published import (
    Published,
    checked_number,
    embedded_manifest,
    entries,
    field,
    in_column_order,
    listed,
    load_tensors,
    missing_numbers,
    read_json,
    restored_order,
    stored_type,
    whole_number,
)
from vestige.index._manifest import IndexedComponent

PROJECTIONS, FULL_GRADIENTS = "proj_iter", "fullgrad_iter"
UNTRUSTED = (
    "The files do not say which example a row is: the published `batch_idx` counts batches that were drawn with "
    "replacement. Rows are in the order of the iterations."
)


class _File(NamedTuple):
    iteration: int
    path: Path


class _Looked(NamedTuple):
    rows: list[int]
    """Per file."""
    dtype: torch.dtype


@final
class IterationRows:
    """Reads rows from the files, one file in memory at a time."""

    def __init__(self, paths: list[Path], rows: list[int], key: str, places: list[slice]) -> None:
        self._paths, self._key, self._places = paths, key, places
        self._ends = np.cumsum(rows)
        self._held: tuple[int, Tensor] | None = None

    def read(self, rows: Int[np.ndarray, "row"]) -> Float[Tensor, "row column"]:
        """The rows, float32, columns in the order of the components."""
        files = np.searchsorted(self._ends, rows, side="right")
        pieces = []
        for file in np.unique(files).tolist():
            start = int(self._ends[file - 1]) if file else 0
            inside = torch.from_numpy(np.asarray(rows)[files == file] - start)
            pieces.append(self._content(file)[inside])
        gradients = torch.cat(pieces).float()
        return torch.cat([gradients[:, place] for place in self._places], dim=1)

    def _content(self, file: int) -> Tensor:
        if self._held is None or self._held[0] != file:
            tensor = load_tensors(self._paths[file])[self._key]
            self._held = file, tensor if tensor.dim() == 2 else tensor[None]
        return self._held[1]


def read_projections(folder: Path) -> Published:
    """Projected gradients: `proj_iter_{i:06d}.pt` {proj, iter, batch_size} and `metadata.json`.

    Raises:
        DataError: A file is missing, torn or does not fit the others; the message names it.
    """
    path = folder / "metadata.json"
    metadata = read_json(path)
    layers = [_layer(layer, path) for layer in entries(metadata, "layers", path)]
    width = whole_number(metadata, "total_proj_dim", path)
    made_by = embedded_manifest(metadata, path)
    components, places = restored_order(in_column_order(layers, width, path), made_by, path)
    return _published("projections", folder, PROJECTIONS, "proj", width, components, places, path, made_by)


def read_full_gradients(folder: Path) -> Published:
    """Exact gradients: `fullgrad_iter_{i:06d}.pt` {grad, iter, batch_size} and `fullgrad_meta.json`.

    Raises:
        DataError: A file is missing, torn or does not fit the others; the message names it.
    """
    path = folder / "fullgrad_meta.json"
    metadata = read_json(path)
    slices = field(metadata, "param_slices", path)
    if not isinstance(slices, dict) or not slices:
        raise DataError(f"{path}: `param_slices` is no object of slices by name. Copy the file again.")
    parts = [
        IndexedComponent(
            name=name,
            kind="parameter",
            shape=_matrix_shape(field(place, "shape", path), path),
            start=whole_number(place, "start", path),
            stop=whole_number(place, "end", path),
        )
        for name, place in slices.items()
    ]
    width = whole_number(metadata, "total_param_dim", path)
    components, places = restored_order(in_column_order(parts, width, path), None, path)
    return _published("fullgrads", folder, FULL_GRADIENTS, "grad", width, components, places, path, None)


def _published(
    layout: str,
    folder: Path,
    stem: str,
    key: str,
    width: int,
    components: tuple[IndexedComponent, ...],
    places: list[slice],
    metadata: Path,
    made_by: Any,
) -> Published:
    files = _files(folder, stem)
    looked = _look(files, key, width)
    numbers = [file.iteration for file in files]
    names = [f"{number}:{place}" for number, rows in zip(numbers, looked.rows, strict=True) for place in range(rows)]
    paths = [file.path for file in files]
    # What an export of ours says in `batch_idx` is true; the rows are written in the order of the data.
    notes = [*([] if made_by is not None else [UNTRUSTED]), *_gaps(numbers)]
    reader = IterationRows(paths, looked.rows, key, places)
    dtype = stored_type(looked.dtype, paths[0])
    return Published(layout, components, dtype, names, reader, [metadata, *paths], notes, made_by)


def _layer(layer: Any, path: Path) -> IndexedComponent:
    start, stop = whole_number(layer, "slice_start", path), whole_number(layer, "slice_end", path)
    name, total = str(field(layer, "name", path)), whole_number(layer, "k_total", path)
    if stop - start != total:
        raise DataError(f"{path}: layer {name} has k_total {total}, and its slice {start}:{stop} is {stop - start}.")
    shape = whole_number(layer, "n_o", path), whole_number(layer, "n_i", path)
    return IndexedComponent(name=name, kind=str(field(layer, "type", path)), shape=shape, start=start, stop=stop)


def _matrix_shape(shape: Any, path: Path) -> tuple[int, int]:
    sizes = [
        checked_number(size, "a size in `shape`", path) for size in (shape if isinstance(shape, list) else [shape])
    ]
    rows = sizes[0] if sizes else 1
    return rows, checked_number(math.prod(sizes) // max(rows, 1), "a product of `shape`", path)


def _files(folder: Path, stem: str) -> list[_File]:
    """The files in the order of their numbers, which is not that of their names beyond 999,999."""
    found = []
    for path in folder.glob(f"{stem}_*.pt"):
        match = re.fullmatch(rf"{stem}_(\d+)\.pt", path.name)
        if match is None:
            raise DataError(f"{path} has no iteration in its name. Expected {stem}_000012.pt; move it elsewhere.")
        found.append(_File(int(match[1]), path))
    if not found:
        raise DataError(f"{folder} holds no {stem}_*.pt. Give the folder in which they lie.")
    return sorted(found)


def _look(files: list[_File], key: str, width: int) -> _Looked:
    """Every file once, before anything is written."""
    rows, dtypes = [], set()
    for number, path in files:
        content = load_tensors(path)
        tensor = field(content, key, path)
        if not isinstance(tensor, Tensor) or tensor.shape[-1:] != (width,) or tensor.dim() > 2:
            shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise DataError(f"{path}: `{key}` is {shape}, expected [rows, {width}] as the metadata say.")
        count = len(tensor) if tensor.dim() == 2 else 1
        if whole_number(content, "iter", path) != number:
            raise DataError(f"{path} says that it is iteration {content['iter']}, and its name says {number}.")
        if whole_number(content, "batch_size", path) != count:
            raise DataError(f"{path} holds {count} rows, and says batch_size {content['batch_size']}: it is not whole.")
        rows.append(count)
        dtypes.add(tensor.dtype)
    if len(dtypes) > 1:
        raise DataError(f"The files of {files[0].path.parent} hold numbers in several formats: {dtypes}.")
    return _Looked(rows, dtypes.pop())


def _gaps(numbers: list[int]) -> list[str]:
    count, lowest = missing_numbers(numbers, numbers[0], numbers[-1] + 1)
    if not count:
        return []
    steps = {after - before for before, after in pairwise(numbers)}
    reason = (
        f" Every {steps.pop()}th iteration was saved; the published software loses those between."
        if len(steps) == 1
        else ""
    )
    return [f"{count:,} iterations are missing between the others: {listed(lowest)}.{reason}"]
