"""`--compress auto`: the most faithful compression that fits a budget of disk."""

from vestige.compress import CompressionSpec, parse_spec
from vestige.errors import DiskSpaceError, SpecError
from vestige.index._compute import lay_out
from vestige.index._manifest import BYTES_PER_NUMBER
from vestige.models import Selection
from vestige.progress import announce, format_bytes
from vestige.settings import CompressionSettings

FEWEST, MOST = 16, 4096
"""Numbers per component that `auto` chooses between: below, scores are noise; above, sketching takes longer than the
model itself."""
FEWEST_SHARED = 256
"""Least numbers for the whole model, whose components disturb each other in them."""
ROW_BYTES = 64 * 2**10
"""Bytes per example that `auto` aims at when no budget is given: a million examples in 64 GiB."""


def choose_spec(settings: CompressionSettings, selection: Selection, examples: int) -> CompressionSpec:
    """The compression that was asked for, or the widest tensor sketch within the disk budget.

    At equal bytes a tensor sketch gave the smallest error of all compressors (`benchmarks/RESULTS.md`). Components
    cannot share one, so for the whole model a sparse projection of the same width follows it.

    Raises:
        DiskSpaceError: Nothing fits the budget.
        SpecError: The spec does not parse, or a budget came without `auto`.
    """
    if settings.compress != "auto":
        if settings.disk is not None:
            raise SpecError(
                f"--disk belongs to --compress auto; --compress {settings.compress!r} says the size itself. Drop one."
            )
        return parse_spec(settings.compress)
    budget = settings.disk_bytes if settings.disk_bytes is not None else ROW_BYTES * examples
    number_bytes = BYTES_PER_NUMBER[settings.dtype] * examples
    shared = settings.compress_scope == "model"
    parts, fewest = (1, FEWEST_SHARED) if shared else (len(selection.components), FEWEST)
    width = min(MOST, budget // (number_bytes * parts))
    if width < fewest:
        of_what = "the whole model" if shared else f"each of {parts} components"
        raise DiskSpaceError(
            f"{examples:,} examples do not fit in {format_bytes(budget)}: {fewest} numbers for {of_what} take "
            f"{format_bytes(fewest * number_bytes * parts)}. Give a larger --disk, fewer --components, or --dtype int8."
        )
    spec = parse_spec(f"tensorsketch:{width} | sjlt:{width}" if shared else f"tensorsketch:{width}")
    size = lay_out(selection.components, spec, settings.compress_scope)[-1].stop * number_bytes
    announce(
        f"--compress auto: {spec} takes {format_bytes(size)} for {examples:,} examples, the widest tensor sketch "
        f"within {format_bytes(budget)}."
    )
    return spec
