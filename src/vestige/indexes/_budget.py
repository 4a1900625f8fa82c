"""`--compress auto`: the most faithful compression that fits a budget of disk."""

from vestige.compress import CompressionSpec, parse_spec
from vestige.errors import DiskSpaceError, SpecError
from vestige.indexes._choice import FEWEST, candidates, choose_for
from vestige.indexes._compute import lay_out
from vestige.indexes._inputs import Inputs
from vestige.indexes._manifest import BYTES_PER_NUMBER
from vestige.progress import announce, format_bytes
from vestige.settings import CompressionSettings

MOST = 4096
"""Most numbers per component that `auto` takes: more bytes bring little."""
FEWEST_SHARED = 256
"""Least numbers for the whole model, whose components disturb each other in them."""
ROW_BYTES = 64 * 2**10
"""Bytes per example that `auto` aims at when no budget is given: a million examples in 64 GiB."""


def choose_spec(
    settings: CompressionSettings, inputs: Inputs, *, earlier: CompressionSpec | None = None
) -> CompressionSpec:
    """Return the requested compression, or with `auto` what `_choice` takes for the disk budget and the device.

    The widest tensor sketch is followed by a sparse projection of the same width where it is for the whole model,
    because components cannot share one.

    An index that was begun goes on with its own choice, `earlier`, if the budget still allows it: the work may have
    moved to another kind of device, where another compressor would be cheaper.

    Raises:
        DiskSpaceError: Nothing fits the budget.
        SpecError: The spec does not parse, or a budget came without `auto`.
    """
    selection, examples = inputs.selection, len(inputs.data)
    if settings.compress != "auto":
        if settings.disk is not None:
            raise SpecError(
                f"--disk belongs to --compress auto; --compress {settings.compress!r} sets the size itself. Drop one."
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
    if shared:
        spec, reason = parse_spec(f"tensorsketch:{width} | sjlt:{width}"), "The widest sketch of the whole model."
    elif earlier is not None and earlier in [one.spec for one in candidates(inputs, width)]:
        spec, reason = earlier, "The index was begun with it."
    else:
        choice = choose_for(inputs, width)
        spec, reason = choice.taken.spec, choice.reason
    size = lay_out(selection.components, spec, settings.compress_scope)[-1].stop * number_bytes
    used = f"{format_bytes(size)} of {format_bytes(budget)}"
    announce(f"--compress auto: {spec} takes {used} for {examples:,} examples. {reason}")
    return spec
