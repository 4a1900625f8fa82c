"""Masks that were trained on a checkpoint, read from a file: `selective:32x32,file=masks.safetensors`."""

from collections.abc import Mapping
from typing import Any

from vestige.compress._coordinates import Coordinates
from vestige.compress._mask_files import read_masks
from vestige.compress._random import Stream
from vestige.compress._registry import compressor
from vestige.errors import SpecError
from vestige.gradients import Side


def _with_digest(size: tuple[int, ...], options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Add the file's digest to the options, by which a spec on disk recognises the masks that it was made with."""
    if not options.get("file"):
        shown = "x".join(map(str, size))
        raise SpecError(
            f"'selective:{shown}' needs the file of trained masks: 'selective:{shown},file=masks.safetensors'. "
            f"For random coordinates write 'mask:{shown}'."
        )
    return options if "digest" in options else {**options, "digest": read_masks(options["file"]).digest}


@compressor(
    "selective",
    forms=("K", "AxB"),
    example="selective:32x32,file=masks.safetensors",
    complete=_with_digest,
    located=True,
)
def selective(
    in_size: int,
    out_size: int,
    stream: Stream,  # noqa: ARG001  (nothing is drawn)
    component: str,
    side: Side | None,
    *,
    file: str = "",
    digest: str = "",
) -> Coordinates:
    """Return the trained coordinates of a component's side, or of its whole gradient, times their trained scale.

    Raises:
        SpecError: The file, the component or the side is missing, or is not the one that the spec was made with.
    """
    masks = read_masks(file)
    if digest != masks.digest:
        raise SpecError(
            f"The masks in '{file}' have changed: their digest is {masks.digest}, and the spec was made with "
            f"{digest}. Restore the old file, or leave digest= out and compress everything again."
        )
    word = side or "whole"
    part = masks.part(component, word)
    if (part.size, len(part.coordinates)) != (in_size, out_size):
        raise SpecError(
            f"The mask '{component}/{word}' in '{file}' keeps {len(part.coordinates)} of {part.size} coordinates; "
            f"the spec keeps {out_size} of {in_size}. Use the size that the masks were trained with, or train again."
        )
    return Coordinates(in_size, part.coordinates, part.scale)
