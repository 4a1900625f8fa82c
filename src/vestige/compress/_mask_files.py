"""Trained masks on disk: one safetensors file for all components of a model.

Tensors, int64, ascending: `<component>/left` and `<component>/right` hold the kept coordinates of the output and of
the input side, `<component>/whole` those of the flattened gradient `[out, in]`. The file's metadata hold, under
`masks`, a JSON object from tensor name to `{"size": coordinates chosen from, "scale": factor of each kept one}`.
"""

import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vestige.errors import SpecError
from vestige.parsing import parse_json


class MaskPart(NamedTuple):
    """Kept coordinates out of `size`, ascending, each multiplied by `scale`."""

    coordinates: Int[Tensor, " kept"]
    size: int
    scale: float


def write_masks(path: str | Path, masks: Mapping[str, Mapping[str, MaskPart]]) -> None:
    """Write the parts (`left` and `right`, or `whole`) of every component to one file."""
    parts = {f"{name}/{word}": part for name, mask in masks.items() for word, part in mask.items()}
    about = {name: {"size": part.size, "scale": part.scale} for name, part in sorted(parts.items())}
    tensors = {name: part.coordinates.to(torch.int64).cpu().contiguous() for name, part in sorted(parts.items())}
    save_file(tensors, path, {"masks": json.dumps(about)})


@dataclass(frozen=True)
class MaskFile:
    """The content of a file of masks, and 16 hexadecimal digits that change whenever the content does."""

    path: str
    digest: str
    parts: Mapping[str, MaskPart]

    def part(self, component: str, word: str) -> MaskPart:
        """Return the mask of one side of a component, or of the whole.

        Raises:
            SpecError: It was never trained. Random coordinates instead would go unnoticed.
        """
        wanted = f"{component}/{word}"
        if wanted in self.parts:
            return self.parts[wanted]
        near = difflib.get_close_matches(wanted, self.parts, n=3, cutoff=0.3)
        raise SpecError(
            f"'{self.path}' holds no mask '{wanted}' (it holds {len(self.parts)}"
            + (f", such as {', '.join(near)}" if near else "")
            + "). Train masks for every selected component, leave this one out with --components, or take random "
            "coordinates with 'mask' in place of 'selective'."
        )


def read_masks(path: str) -> MaskFile:
    """Read the masks in a file that `write_masks` wrote.

    Raises:
        SpecError: There is no such file, or it holds something else.
    """
    try:
        state = Path(path).stat()
        return _read(path, state.st_mtime_ns, state.st_size)
    except FileNotFoundError as missing:
        raise SpecError(
            f"There is no file of masks '{path}' (searched from {Path.cwd()}). Give the file that the masks were "
            "written to, or take random coordinates with 'mask' in place of 'selective'."
        ) from missing
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as broken:
        raise SpecError(
            f"'{path}' is not a file of trained masks ({type(broken).__name__}: {broken}). Expected a safetensors "
            "file with tensors '<component>/left' and '<component>/right', or '<component>/whole'."
        ) from broken


@lru_cache(maxsize=2)
def _read(path: str, modified: int, size: int) -> MaskFile:  # noqa: ARG001  (a changed file is another file)
    digest = hashlib.blake2b(Path(path).read_bytes(), digest_size=8).hexdigest()
    with safe_open(path, framework="pt") as file:
        about = parse_json((file.metadata() or {})["masks"])
        parts = {
            name: MaskPart(file.get_tensor(name).to(torch.int64), int(entry["size"]), float(entry["scale"]))
            for name, entry in about.items()
        }
    for name, part in parts.items():
        rising = bool((part.coordinates[1:] > part.coordinates[:-1]).all())
        if not rising or part.coordinates.min() < 0 or part.coordinates.max() >= part.size:
            raise ValueError(f"{name} does not list ascending coordinates below {part.size}")
    return MaskFile(path, digest, parts)
