"""`--compress auto`: the most faithful compression that fits a budget of disk."""

from vestige.compress import CompressionSpec, parse_spec
from vestige.errors import DiskSpaceError, SpecError
from vestige.index._compute import lay_out
from vestige.index._manifest import BYTES_PER_NUMBER
from vestige.models import Selection
from vestige.progress import announce, format_bytes
from vestige.settings import CompressionSettings

_SIDES = (512, 384, 256, 192, 128, 96, 64, 48, 32, 24, 16, 12, 8, 6, 4)
_ROW_BYTES = 64 * 2**10
"""Bytes per example that `auto` aims at when no budget is given: a million examples in 64 GB."""


def choose_spec(settings: CompressionSettings, selection: Selection, examples: int) -> CompressionSpec:
    """The compression that was asked for, or the widest two-sided projection within the disk budget.

    Raises:
        DiskSpaceError: Nothing fits the budget.
        SpecError: The spec does not parse, or a budget came without `auto`.
    """
    if settings.compress != "auto":
        if settings.disk is not None:
            raise SpecError(
                f"--disk belongs to --compress auto; --compress {settings.compress!r} says the size itself."
            )
        return parse_spec(settings.compress)
    budget = settings.disk_bytes if settings.disk_bytes is not None else _ROW_BYTES * examples
    size = 0
    for side in _SIDES:
        spec = parse_spec(f"logra:{side}x{side}")
        size = lay_out(selection.components, spec)[-1].stop * BYTES_PER_NUMBER[settings.dtype] * examples
        if size <= budget:
            announce(
                f"--compress auto: {spec} takes {format_bytes(size)} for {examples:,} examples, the widest "
                f"two-sided projection within {format_bytes(budget)}."
            )
            return spec
    raise DiskSpaceError(
        f"No compression of {examples:,} examples fits in {format_bytes(budget)}: the smallest, logra:4x4, takes "
        f"{format_bytes(size)}. Give a larger --disk, fewer --components, or --dtype int8."
    )
